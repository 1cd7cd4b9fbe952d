"""The log-probabilities that ratios are taken against, and how far trainer and engine are apart.

They are the trainer's, by a forward pass before the updates (the official code's way), or those
that the engine sampled with. Δ of a token is the trainer's log-probability minus the engine's.
"""

import logging
import math
from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np

from megatron_nft.config import DriftConfig
from megatron_nft.policy.packing import Sequence
from megatron_nft.policy.step import Policy
from megatron_nft.rollout.groups import Response

RATIO_LOW, RATIO_HIGH = 0.9, 1.1
MAX_DELTA = 20.0  # beyond it exp(Δ) says nothing that the largest |Δ| does not

logger = logging.getLogger("megatron_nft")


def by_trainer(
    policy: Policy, sequences: Seq[Sequence], options: DriftConfig
) -> tuple[list[Sequence], dict[str, float]]:
    """The sequences with the policy's log-probabilities as old ones, and the drift; collective.

    With `importance_cap` each token also gets the truncated importance weight of the trainer over
    the engine that sampled it.
    """
    logp = policy.logp(sequences)
    deltas = [p - s.logp for p, s in zip(logp, sequences, strict=True)]
    found = [replace(s, old_logp=p) for s, p in zip(sequences, logp, strict=True)]
    if not options.importance_cap:
        return found, drift(deltas)
    weights = [importance(delta, options.importance_cap) for delta in deltas]
    found = [replace(s, importance=w) for s, w in zip(found, weights, strict=True)]
    flat = np.concatenate(weights)
    return found, drift(deltas) | {
        "importance_mean": float(flat.mean(dtype=np.float64)),
        "importance_capped_fraction": float((flat >= options.importance_cap).mean()),
    }


def importance(delta: np.ndarray, cap: float) -> np.ndarray:
    """min(exp(Δ), cap), float32 [T]: less for what the engine samples too often, more for the rest.

    Truncated importance sampling (Ionides 2008), per token as in Yao et al. 2025, "Your efficient
    RL framework secretly brings you off-policy RL training".
    """
    return np.minimum(np.exp(delta.clip(max=MAX_DELTA)), cap).astype(np.float32)


def of_answers(policy: Policy, answers: Seq[tuple[np.ndarray, Response]]) -> dict[str, float]:
    """The drift that answers of the newest weights show, each with its prompt; collective."""
    sequences = [Sequence(p, r.tokens, r.logp, r.logp, False, 0.0) for p, r in answers]
    logp = policy.logp(sequences)
    return drift([ours - s.logp for ours, s in zip(logp, sequences, strict=True)])


def of_update(
    log_ratio: Seq[np.ndarray], minibatch: Seq[Sequence], version: int
) -> dict[str, float]:
    """The drift as a rollout's first update saw it, where the engine's log-probabilities are taken.

    Before that update the ratio of what the policy's own version sampled is the engines'
    difference and nothing else. What older versions sampled is reported apart: there the policy
    has moved as well.

    Args:
        log_ratio: of each sequence, float32 [T].
        version: of the policy before the update.
    """
    pairs = list(zip(log_ratio, minibatch, strict=True))
    fresh = [r for r, s in pairs if s.version == version]
    older = [r for r, s in pairs if s.version != version]
    found = drift(fresh) if fresh else {}
    return found | ({f"off_policy_{k}": v for k, v in drift(older).items()} if older else {})


def drift(deltas: Seq[np.ndarray]) -> dict[str, float]:
    """Mean and largest |Δ|, the divergence of the engine from the trainer, and the share of tokens
    whose ratio exp(Δ) is outside [0.9, 1.1].

    kl_estimate is the mean of exp(Δ) − 1 − Δ over the engine's own samples (k3 of Schulman's note
    "Approximating KL divergence"), Δ cut at 20.
    """
    flat = np.concatenate(deltas).astype(np.float64)
    cut = flat.clip(-MAX_DELTA, MAX_DELTA)
    ratio = np.exp(cut)
    return {
        "logp_delta_mean": float(np.abs(flat).mean()),
        "logp_delta_max": float(np.abs(flat).max()),
        "kl_estimate": float((np.expm1(cut) - cut).mean()),
        "ratio_outside_fraction": float(((ratio < RATIO_LOW) | (ratio > RATIO_HIGH)).mean()),
    }


def act_on(found: dict[str, float], options: DriftConfig) -> None:
    """Warn of a drift, or stop the run; every rank has the same numbers.

    Raises:
        RuntimeError: the mean |Δ| is above drift.stop, or anything that was found is no number, of
            older versions' answers too.
    """
    broken = {key: value for key, value in found.items() if not math.isfinite(value)}
    if broken:
        raise RuntimeError(
            f"log-probabilities of the trainer or the engine are no numbers: {broken}; no "
            "drift.stop lets them pass. Look at the engine's answers and its last weights"
        )
    mean = found.get("logp_delta_mean", 0.0)
    if mean > options.stop:
        raise RuntimeError(
            f"trainer and engine differ by {mean:.4f} in the mean log-probability of a token, "
            f"{found['logp_delta_max']:.4f} at most; drift.stop is {options.stop}. The engine does "
            "not compute what is trained: compare dtypes, rollout.quantization and versions, or "
            "raise drift.stop"
        )
    if mean > options.warn:
        logger.warning(
            "trainer and engine differ by %.4f in the mean log-probability, %.4f at most; "
            "drift.warn is %.4f",
            mean,
            found["logp_delta_max"],
            options.warn,
        )
