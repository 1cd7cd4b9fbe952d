"""Old log-probabilities, drift between trainer and engine, and importance weights, by formula."""

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from policies import configured, policy_of, weights_of
from processes import run
from reference import LR
from toys import random_sequences, save_qwen2

from megatron_nft import old_logp
from megatron_nft.config import DriftConfig, ObjectiveConfig, ParallelConfig
from megatron_nft.policy.packing import Sequence

NFT = ObjectiveConfig(name="nft")
LAYOUTS = {"TP2": {"tensor": 2}, "PP2": {"pipeline": 2}, "CP2": {"context": 2}, "DP2": {}}
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


def test_a_run_stops_above_the_limit() -> None:
    """Row 13 of field_failures: trainer and engine drift apart until the run collapses."""
    found = {"logp_delta_mean": 0.51, "logp_delta_max": 7.0}
    with pytest.raises(RuntimeError, match=r"drift.stop is 0.5.*raise drift.stop"):
        old_logp.act_on(found, DriftConfig())


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("versions", [(3, 3), (3, 2), (2, 3), (2, 2)])
def test_a_run_stops_at_what_is_no_number(versions: tuple[int, int], value: float) -> None:
    minibatch = [replace(s, version=v) for s, v in zip(sequences(), versions, strict=True)]
    deltas = [DELTAS[0], np.array([value], np.float32)]
    found = old_logp.of_update(deltas, minibatch, version=3)
    with pytest.raises(RuntimeError, match=r"no numbers: .*logp_delta_mean"):
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


# both modes, through a policy


def _updates(path: Path, layout: ParallelConfig, agrees: bool) -> dict[str, Any]:
    """The drift of both modes, and the weights and what was measured after an update in each."""
    policies = [policy_of(configured(path, NFT, layout)) for _ in range(2)]
    answers = random_sequences(13)
    if agrees:
        own = policies[0].logp(answers)
        answers = [replace(s, logp=p, old_logp=p) for s, p in zip(answers, own, strict=True)]
    by_trainer, drift = old_logp.by_trainer(policies[0], answers, DriftConfig())
    measured = [
        policy.update(minibatch, LR)
        for policy, minibatch in zip(policies, (by_trainer, answers), strict=True)
    ]
    drifts = [drift, old_logp.of_update(measured[1]["log_ratio"], answers, version=0)]
    return {"drifts": drifts, "weights": [*map(weights_of, policies)], "measured": measured}


def _in_layouts(path: Path, layouts: list[ParallelConfig]) -> list[dict[bool, Any]]:
    from megatron_nft.policy import parallel

    parallel.initialize(ParallelConfig(), seed=0)
    found = []
    for layout in layouts:
        parallel.lay_groups(layout, seed=0)
        found.append({agrees: _updates(path, layout, agrees) for agrees in (True, False)})
    parallel.finalize()
    return found


@pytest.fixture(scope="module")
def updates(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank and layout."""
    path = save_qwen2(tmp_path_factory.mktemp("model"))
    found = run(_in_layouts, 2, path, [ParallelConfig(**options) for options in LAYOUTS.values()])
    return [dict(zip(LAYOUTS, of_rank, strict=True)) for of_rank in found]


@pytest.mark.processes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_an_engine_that_agrees_both_modes_are_one(
    updates: list[dict[str, Any]], layout: str
) -> None:
    found = updates[0][layout][True]
    by_trainer, by_engine = found["weights"]
    assert by_trainer.keys() == by_engine.keys()
    assert all(np.array_equal(by_trainer[name], by_engine[name]) for name in by_trainer)
    for key in ("loss", "grad_norm", "ratio"):
        np.testing.assert_array_equal(*(measured[key] for measured in found["measured"]))
    assert not any(found["drifts"][0].values())


@pytest.mark.processes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_modes_measure_the_same_drift_on_every_rank(
    updates: list[dict[str, Any]], layout: str
) -> None:
    by_trainer, by_engine = updates[0][layout][False]["drifts"]
    assert by_trainer["logp_delta_mean"] > 0.1  # the engine's log-probabilities are random
    assert by_engine == pytest.approx(by_trainer, rel=1e-5)
    assert updates[1][layout][False]["drifts"] == [by_trainer, by_engine]  # to the bit
