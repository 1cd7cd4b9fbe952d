"""Training objectives: pure functions from the log-probabilities of response tokens to a loss each.

None of them reduces: whoever calls divides the sum once, over the whole mini-batch. r is a token's
`correct`, r̂ its `group_accuracy`, R = π_θ/π_old. "Official code" is NVlabs/NFT, `dp_actor.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_nft.config import ObjectiveConfig

MAX_LOG_RATIO = 10.0  # the official code's; beyond it a token has a finite loss and no gradient
MIN_ACCURACY, MAX_ACCURACY = 0.02, 0.98  # the official code's bounds on r̂, for NFT
STD_EPSILON = 1e-6  # verl's: r̂ of 0 or 1 gives the advantage 0, not 0/0


@dataclass(frozen=True)
class TokenBatch:
    """The response tokens of some sequences, T of them in any order."""

    old_logp: Tensor  # float32 [T], under the policy that sampled
    correct: Tensor  # float32 [T], 1 for tokens of a right answer, 0 for a wrong one
    group_accuracy: Tensor  # float32 [T], r̂ of the token's group
    sequence_ids: Tensor  # int64 [T], 0..num_sequences-1, which sequence the token belongs to
    num_sequences: int
    advantage: Tensor | None = None  # float32 [T], where rewards are more than right and wrong

    def select(self, tokens: Tensor) -> "TokenBatch":
        """Some of the tokens, by index int64 [t]."""
        return TokenBatch(
            old_logp=self.old_logp[tokens],
            correct=self.correct[tokens],
            group_accuracy=self.group_accuracy[tokens],
            sequence_ids=self.sequence_ids[tokens],
            num_sequences=self.num_sequences,
            advantage=None if self.advantage is None else self.advantage[tokens],
        )


@dataclass(frozen=True)
class TokenLoss:
    """A loss for each token, and what to log of each: detached, for the caller to average."""

    loss: Tensor  # float32 [T], not reduced
    metrics: dict[str, Tensor]  # float32 [T] each


Objective = Callable[[TokenBatch, Tensor, ObjectiveConfig], TokenLoss]


OMEGAS: dict[str, Callable[[Tensor], Tensor]] = {  # ω(r̂); official `normalize` 0, 1, 2
    "uniform": torch.ones_like,
    "dr_grpo": lambda accuracy: 1 - accuracy,
    "grpo": lambda accuracy: ((1 - accuracy) / accuracy).sqrt(),
}


def nft(batch: TokenBatch, logp: Tensor, options: ObjectiveConfig) -> TokenLoss:
    """Negative-aware fine-tuning (arXiv 2505.18116), with the official code's bounds.

        loss = ω(r̂) · [ −r·log R − negative_weight·(1−r)·log max_v((1 − r̂R)/(1 − r̂), ε) ]

    log R is cut at 10 and r̂ to [0.02, 0.98], in ω too; max_v clips the value, not the gradient.
    On ∇log π that is −ω for a right token and +ω·r̂/(1−r̂)·R/max((1−r̂R)/(1−r̂), ε) for a wrong one.

    `ratio: sequence` puts the product of a sequence's ratios, exp(min(Σ_t log R_t, 10)), in R's
    place. The official code counts such a sequence once; here each of its n tokens carries 1/n of
    the loss, so that the sum over tokens is the same. It needs whole sequences.

    `logp` is float32 [T]. Metrics: `ratio`; `clip_fraction`, 1 for a wrong token below ε and 0 for
    every other token (divide its mean by that of 1−r for the fraction of the wrong tokens).
    """
    accuracy = batch.group_accuracy.clamp(MIN_ACCURACY, MAX_ACCURACY)
    weight = OMEGAS[options.omega](accuracy)
    log_ratio = _log_ratio(batch, logp)
    if options.ratio == "sequence":
        log_ratio, num_tokens = _over_sequences(batch, log_ratio)
        weight = weight / num_tokens
    else:
        assert options.ratio == "token", options.ratio
    log_ratio = log_ratio.clamp(max=MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    implicit_ratio = (1 - accuracy * ratio) / (1 - accuracy)  # π⁻_θ/π_old

    wrong = 1 - batch.correct
    positive = -log_ratio
    negative = -_clip_value(implicit_ratio, options.epsilon).log()
    loss = weight * (batch.correct * positive + options.negative_weight * wrong * negative)
    clipped = wrong * (implicit_ratio < options.epsilon)
    return TokenLoss(loss, {"ratio": ratio.detach(), "clip_fraction": clipped})


def rft(batch: TokenBatch, logp: Tensor, options: ObjectiveConfig) -> TokenLoss:
    """Rejection-sampling fine-tuning (arXiv 2308.01825): likelihood of the right answers, ω = 1.

        loss = −r·log π_θ

    Its gradient is that of NFT with negative_weight 0 and ω = 1, except that no log R is too large.
    """
    return TokenLoss(-batch.correct * logp, {"ratio": _ratio(batch, logp).detach()})


def grpo(batch: TokenBatch, logp: Tensor, options: ObjectiveConfig) -> TokenLoss:
    """Group relative policy optimization (arXiv 2402.03300), without its KL term.

        loss = −min(R·A, clip(R, 1 − clip_low, 1 + clip_high)·A),  A = (r − r̂)/(√(r̂(1−r̂)) + 1e-6)

    The standard deviation is the population's, with which NFT at ω = √((1−r̂)/r̂) has the same
    gradient on-policy. verl takes the sample's: its A is smaller by √((K−1)/K), 3 % at K = 16. With
    `overlong_buffer` see dapo.
    """
    return _clipped_surrogate(batch, logp, _standardized_advantage(batch), options)


def dr_grpo(batch: TokenBatch, logp: Tensor, options: ObjectiveConfig) -> TokenLoss:
    """GRPO done right (arXiv 2503.20783): not divided by the standard deviation.

        loss = −min(R·A, clip(R, 1 − clip_low, 1 + clip_high)·A),  A = r − r̂

    Its other half, no division by a sequence's length, is the denominator `constant`.
    """
    return _clipped_surrogate(batch, logp, batch.correct - batch.group_accuracy, options)


def dapo(batch: TokenBatch, logp: Tensor, options: ObjectiveConfig) -> TokenLoss:
    """DAPO (arXiv 2503.14476): GRPO's loss of a token, clipped further up than down.

        loss = −min(R·A, clip(R, 1 − clip_low, 1 + clip_high)·A),  A = (r − r̂)/(√(r̂(1−r̂)) + 1e-6)

    What sets it apart is set elsewhere: clip_high 0.28 and the denominator `token_mean` in the
    recipe, groups that are neither all right nor all wrong in the rollout; and with
    `overlong_buffer` rewards of ±1 that fall with the length (its equation 13, rewards.py), whose
    mean and deviation A then has.
    """
    return _clipped_surrogate(batch, logp, _standardized_advantage(batch), options)


def sft(batch: TokenBatch, logp: Tensor, options: ObjectiveConfig) -> TokenLoss:
    """Supervised fine-tuning on worked solutions: loss = −log π_θ on every token.

    Looks at nothing in `batch`.
    """
    return TokenLoss(-logp, {})


OBJECTIVES: dict[str, Objective] = {
    "nft": nft,
    "rft": rft,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "sft": sft,
}

# Where a token's loss depends on no other token's log-probability; an objective that is not here is
# taken to look at sequences, which is never wrong but costs the head a fourth matmul.
PER_TOKEN: dict[str, Callable[[ObjectiveConfig], bool]] = {
    "nft": lambda options: options.ratio == "token",
    **dict.fromkeys(("rft", "grpo", "dr_grpo", "dapo", "sft"), lambda _: True),
}


def is_per_token(options: ObjectiveConfig) -> bool:
    return options.name in PER_TOKEN and PER_TOKEN[options.name](options)


def _log_ratio(batch: TokenBatch, logp: Tensor) -> Tensor:
    assert logp.shape == batch.old_logp.shape, (logp.shape, batch.old_logp.shape)
    assert logp.dtype == batch.old_logp.dtype == torch.float32, (logp.dtype, batch.old_logp.dtype)
    return logp - batch.old_logp


def _ratio(batch: TokenBatch, logp: Tensor) -> Tensor:
    """R = exp(min(log π_θ − log π_old, 10)), float32 [T]."""
    return _log_ratio(batch, logp).clamp(max=MAX_LOG_RATIO).exp()


def _over_sequences(batch: TokenBatch, values: Tensor) -> tuple[Tensor, Tensor]:
    """For each token, the sum of `values` over its sequence and how many tokens that has, [T]."""
    sums = values.new_zeros(batch.num_sequences).index_add(0, batch.sequence_ids, values)
    num_tokens = torch.bincount(batch.sequence_ids, minlength=batch.num_sequences)
    return sums[batch.sequence_ids], num_tokens[batch.sequence_ids]


def _clip_value(x: Tensor, minimum: float) -> Tensor:
    """max_v of the paper: the value of max(x, minimum), the gradient of x.

    x − stopgrad(x) is exactly zero. The paper's order, x + stopgrad(max(x, ε) − x), rounds by up to
    0.06 at x = −10⁶, where r̂ = 0.98 and log R = 10 lead, and a small ε may become zero.
    """
    return x.detach().clamp(min=minimum) + (x - x.detach())


def _standardized_advantage(batch: TokenBatch) -> Tensor:
    """(r − mean)/(std + 1e-6) in a group of rewards 0 and 1 of mean r̂; population std; [T].

    Or what the batch has instead: rewards.py.
    """
    if batch.advantage is not None:
        return batch.advantage
    accuracy = batch.group_accuracy
    return (batch.correct - accuracy) / ((accuracy * (1 - accuracy)).sqrt() + STD_EPSILON)


def _clipped_surrogate(
    batch: TokenBatch, logp: Tensor, advantage: Tensor, options: ObjectiveConfig
) -> TokenLoss:
    """PPO's −min(R·A, clip(R, 1 − clip_low, 1 + clip_high)·A) (arXiv 1707.06347, equation 7).

    log R is cut at 10, as in NFT, so that a wrong token cannot overflow. Metrics: `ratio`;
    `clip_fraction`, 1 for a token where the clipped term is the smaller one: no gradient.
    """
    ratio = _ratio(batch, logp)
    bounded = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    surrogate, limit = ratio * advantage, bounded * advantage
    clipped = (limit < surrogate).to(ratio.dtype)
    loss = -torch.minimum(surrogate, limit)
    return TokenLoss(loss, {"ratio": ratio.detach(), "clip_fraction": clipped})
