"""Old log-probabilities, drift between trainer and engine, and importance weights, by formula."""

import logging
import math
from dataclasses import replace

import numpy as np
import pytest

from megatron_nft import old_logp
from megatron_nft.config import DriftConfig
from megatron_nft.policy.packing import Sequence

DELTAS = [np.array([0.0, 0.2, -0.3], np.float32), np.array([0.05], np.float32)]


def sequences(version: int = 0) -> list[Sequence]:
    rng = np.random.default_rng(0)
    return [
        Sequence(
            prompt=np.array([1], np.int32),
            response=np.arange(len(d), dtype=np.int32),
            logp=(logp := rng.normal(-2, 1, len(d)).astype(np.float32)),
            old_logp=logp,
            correct=True,
            group_accuracy=0.5,
            version=version,
        )
        for d in DELTAS
    ]


class Trainer:
    """Log-probabilities that differ from the engine's by DELTAS."""

    def logp(self, given: list[Sequence]) -> list[np.ndarray]:
        return [s.logp + d for s, d in zip(given, DELTAS, strict=True)]


def test_drift_by_its_formulas() -> None:
    found = old_logp.drift(DELTAS)
    values = [0.0, 0.2, -0.3, 0.05]
    kl = sum(math.exp(d) - 1 - d for d in values) / 4
    assert found["logp_delta_mean"] == pytest.approx(0.55 / 4, rel=1e-6)
    assert found["logp_delta_max"] == pytest.approx(0.3, rel=1e-6)
    assert found["kl_estimate"] == pytest.approx(kl, rel=1e-5)
    assert found["ratio_outside_fraction"] == 0.5  # e^0.2 and e^-0.3


def test_the_kl_estimate_is_the_divergence_in_the_mean() -> None:
    """Of samples of a distribution q, the mean is KL(q ‖ p), the engine's from the trainer's."""
    rng = np.random.default_rng(0)
    q, p = rng.dirichlet(np.ones(8)), rng.dirichlet(np.ones(8))
    tokens = rng.choice(8, 400_000, p=q)
    found = old_logp.drift([np.log(p[tokens] / q[tokens]).astype(np.float32)])
    assert found["kl_estimate"] == pytest.approx((q * np.log(q / p)).sum(), rel=0.02)


def test_huge_differences_stay_numbers_and_nan_shows() -> None:
    found = old_logp.drift([np.array([-500.0, 300.0], np.float32)])
    assert all(map(math.isfinite, found.values()))
    assert found["logp_delta_max"] == 500
    assert math.isnan(old_logp.drift([np.array([0.0, np.nan], np.float32)])["logp_delta_mean"])


def test_the_trainers_are_the_old_ones_and_the_engines_are_kept() -> None:
    found, drift = old_logp.by_trainer(Trainer(), sequences(), DriftConfig())
    for ours, before, delta in zip(found, sequences(), DELTAS, strict=True):
        np.testing.assert_array_equal(ours.old_logp, before.logp + delta)
        np.testing.assert_array_equal(ours.logp, before.logp)
        assert ours.importance is None
    assert drift == pytest.approx(old_logp.drift(DELTAS), rel=1e-4)


def test_importance_weights_are_truncated_above() -> None:
    found, metrics = old_logp.by_trainer(Trainer(), sequences(), DriftConfig(importance_cap=1.1))
    expected = [[1.0, 1.1, math.exp(-0.3)], [math.exp(0.05)]]
    for ours, weights in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.importance, weights, rtol=1e-5)
        assert ours.importance.dtype == np.float32
    assert metrics["importance_mean"] == pytest.approx(np.mean([*expected[0], *expected[1]]))
    assert metrics["importance_capped_fraction"] == 0.25


def test_weights_of_huge_differences_are_the_cap() -> None:
    weights = old_logp.importance(np.array([800.0, -800.0], np.float32), cap=2.0)
    np.testing.assert_array_equal(weights, np.array([2.0, 0.0], np.float32))


def test_drift_of_an_update_is_of_what_its_own_version_sampled() -> None:
    first, second = sequences()
    minibatch = [replace(first, version=3), replace(second, version=2)]
    found = old_logp.of_update(DELTAS, minibatch, version=3)
    fresh, older = old_logp.drift(DELTAS[:1]), old_logp.drift(DELTAS[1:])
    assert found == fresh | {f"off_policy_{key}": value for key, value in older.items()}
    assert old_logp.of_update(DELTAS, sequences(3), version=3) == old_logp.drift(DELTAS)
    only_older = old_logp.of_update(DELTAS, sequences(2), version=3)
    assert all(key.startswith("off_policy_") for key in only_older)


@pytest.mark.parametrize("mean", [0.51, math.inf, math.nan])
def test_a_run_stops_above_the_limit(mean: float) -> None:
    found = {"logp_delta_mean": mean, "logp_delta_max": 7.0}
    with pytest.raises(RuntimeError, match=r"drift.stop is 0.5.*raise drift.stop"):
        old_logp.act_on(found, DriftConfig())


@pytest.mark.parametrize(("mean", "num_warnings"), [(0.04, 0), (0.06, 1), (0.5, 1)])
def test_a_warning_below_it(
    mean: float, num_warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="megatron_nft"):
        old_logp.act_on({"logp_delta_mean": mean, "logp_delta_max": 1.0}, DriftConfig())
    assert len(caplog.records) == num_warnings


def test_nothing_known_is_no_drift() -> None:
    old_logp.act_on({"off_policy_logp_delta_mean": 9.0}, DriftConfig())
