"""What a rollout's groups come to in the metrics."""

import numpy as np
import pytest
from test_collect import group, tally_of

from megatron_nft.config import ObjectiveConfig
from megatron_nft.metrics import PhaseTimer
from megatron_nft.policy.packing import sequences_of
from megatron_nft.statistics import (
    mean_accuracy,
    rollout_statistics,
    staleness,
    step_statistics,
)


def test_staleness_is_of_answers() -> None:
    groups = [group(0, "+-+-", version=4), group(1, "+-", version=2)]
    found = staleness(groups, version=5)
    assert found == {"steps_off_policy_mean": pytest.approx(10 / 6), "steps_off_policy_max": 3}


def test_a_rollouts_tokens_are_counted_and_so_are_those_that_trained_nothing() -> None:
    groups = [group(0, "++--"), group(1, "+---")]
    tally = tally_of([*groups, group(2, "----"), group(3, "++++")])  # 10 tokens each
    timer = PhaseTimer()
    with timer.phase("rollout"):
        pass
    pairs = [(g, sequences_of([g])) for g in groups]
    found = rollout_statistics(pairs, tally, timer, version=1)
    assert found["tokens_trained"] == 20
    assert found["tokens_sampled"] == 40
    assert found["accuracy_kept"] == 0.375
    assert found["steps_off_policy_max"] == 1
    assert found["tokens_per_second"] == pytest.approx(20 / timer.seconds()["rollout"])


def test_without_sampling_there_is_nothing_of_it() -> None:
    timer = PhaseTimer()
    with timer.phase("update"):
        pass
    pairs = [(g, sequences_of([g])) for g in [group(0, "+")]]
    found = rollout_statistics(pairs, None, timer, version=0)
    assert found.keys() == {"tokens_trained", "tokens_per_second"}


def test_nft_clips_wrong_answers_only() -> None:
    minibatch = sequences_of([group(0, "+-")])  # of one and of two tokens
    measured = {
        "loss": 1.0,
        "grad_norm": 2.0,
        "entropy": np.array([1.0, 2.0, 3.0]),
        "ratio": np.array([0.5, 1.0, 2.0]),
        "clip_fraction": np.array([0.0, 1.0, 0.0]),
    }
    found = step_statistics(measured, minibatch, ObjectiveConfig(name="nft"))
    assert found["clip_fraction"] == 0.5
    assert (found["entropy"], found["ratio_q50"], found["ratio_max"]) == (2.0, 1.0, 2.0)
    found = step_statistics(measured, minibatch, ObjectiveConfig(name="grpo"))
    assert found["clip_fraction"] == pytest.approx(1 / 3)


def test_mean_accuracy_is_over_the_sets() -> None:
    assert mean_accuracy({"eval/a/accuracy": 0.5, "eval/b/accuracy": 0.7, "accuracy_all": 0}) == 0.6
    assert mean_accuracy({}) == 0.0
