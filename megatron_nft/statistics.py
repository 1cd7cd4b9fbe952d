"""What one step's arrays come to in the metrics."""

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from megatron_nft.config import ObjectiveConfig
from megatron_nft.metrics import PhaseTimer
from megatron_nft.policy.packing import Sequence
from megatron_nft.rollout.groups import Group
from megatron_nft.rollout.tally import Tally

QUANTILES = {"ratio_q01": 0.01, "ratio_q50": 0.5, "ratio_q99": 0.99, "ratio_max": 1.0}


def step_statistics(
    measured: dict[str, Any], minibatch: Seq[Sequence], options: ObjectiveConfig
) -> dict[str, float]:
    """Loss, gradient norm, entropy, ratio quantiles and clip fraction of one optimizer step.

    NFT clips wrong answers only, so that its clip fraction is that of their tokens.
    """
    found = {
        "loss": measured["loss"],
        "grad_norm": measured["grad_norm"],
        "entropy": float(measured["entropy"].mean()),
    }
    if "ratio" in measured:
        quantiles = np.quantile(measured["ratio"], list(QUANTILES.values()))
        found |= dict(zip(QUANTILES, map(float, quantiles), strict=True))
    if "clip_fraction" in measured:
        num_clipped = float(measured["clip_fraction"].sum())
        can_clip = [len(s.response) for s in minibatch if options.name != "nft" or not s.correct]
        found["clip_fraction"] = num_clipped / max(1, sum(can_clip))
    return found


def rollout_statistics(
    groups: Seq[tuple[Group, Seq[Sequence]]],
    tally: Tally | None,
    timer: PhaseTimer,
    version: int,
) -> dict[str, float]:
    """How fast a rollout was trained on, and what its answers were like if they were sampled.

    `version` is that of the policy before it.
    """
    tokens = sum(len(s.response) for _, sequences in groups for s in sequences)
    found = {
        "tokens_trained": tokens,
        "tokens_per_second": tokens / sum(timer.seconds().values()),
    }
    if tally is None:
        return found
    accuracies = [group.accuracy for group, _ in groups]
    return (
        found
        | tally.metrics()
        | staleness([group for group, _ in groups], version)
        | {
            "tokens_sampled": tally.num_tokens,
            "accuracy_kept": float(np.mean(accuracies)),
        }
    )


def mean_accuracy(record: dict[str, Any]) -> float:
    """Over the evaluation sets in a record; 0 where there are none."""
    found = [value for key, value in record.items() if key.endswith("/accuracy")]
    return float(np.mean(found)) if found else 0.0


def staleness(groups: Seq[Group], version: int) -> dict[str, float]:
    """By how many rollouts the weights that sampled are older than those that are trained."""
    steps = [version - r.version for group in groups for r in group.responses]
    assert min(steps) >= 0, "sampled by weights that are not trained yet"
    return {
        "steps_off_policy_mean": float(np.mean(steps)),
        "steps_off_policy_max": max(steps),
    }
