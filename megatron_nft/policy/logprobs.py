"""Hidden states to log-probabilities of given tokens, through the vocabulary shards.

Logits are made chunk by chunk and made again in backward: nothing of size [tokens, vocabulary]
outlives its chunk. Reached through GPTModel's `output_processor` hook.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

CHUNK_CELLS = 2**25  # float32 logits alive at a time on a rank: 128 MiB


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden · weightᵀ / temperature)[target] and the distribution's entropy.

    Args:
        hidden: [T, H], whole on every tensor-parallel rank, any float dtype.
        weight: [V/TP, H], this rank's rows of the head; rows at and past `vocab_size` are
            padding and take no probability.
        targets: int64 [T], global token ids.

    Returns:
        logp float32 [T] (differentiable in hidden and weight) and entropy float32 [T] (in nats,
        not differentiable), the same on every tensor-parallel rank.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, vocab_size, group)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        vocab_size: int,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        shard = _Shard(weight, temperature, vocab_size, group)
        parts = [
            _chunk_logprobs(shard, hidden[rows], targets[rows])
            for rows in _chunks(hidden.shape[0], weight.shape[0])
        ]
        logp, entropy, log_z = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, targets, log_z)
        ctx.temperature, ctx.vocab_size, ctx.group = temperature, vocab_size, group
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_logp: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_z = ctx.saved_tensors
        shard = _Shard(weight, ctx.temperature, ctx.vocab_size, ctx.group)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows in _chunks(hidden.shape[0], weight.shape[0]):
            # d logp / d logits = onehot(target) − softmax, over the temperature
            grad = shard.logits(hidden[rows]).sub_(log_z[rows, None]).exp_().neg_()
            local, is_local = shard.local(targets[rows])
            grad[torch.arange(len(local), device=grad.device), local] += is_local.float()
            grad.mul_(grad_logp[rows, None] / ctx.temperature)
            grad = grad.to(weight.dtype)
            grad_hidden[rows] = grad @ weight
            grad_weight.addmm_(grad.t().float(), hidden[rows].float())
        if ctx.group.size() > 1:
            dist.all_reduce(grad_hidden, group=ctx.group)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


class _Shard:
    """This rank's part of the vocabulary: rows [start, start + size) of the head."""

    def __init__(
        self, weight: Tensor, temperature: float, vocab_size: int, group: dist.ProcessGroup
    ) -> None:
        self.weight, self.temperature, self.group = weight, temperature, group
        self.start = group.rank() * weight.shape[0]
        self.num_real = max(0, min(weight.shape[0], vocab_size - self.start))

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [chunk, V/TP]; padding is −inf."""
        logits = (hidden @ self.weight.t()).float().div_(self.temperature)
        logits[:, self.num_real :] = -torch.inf
        return logits

    def local(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Targets as columns of this shard, and which of them lie in it."""
        local = targets - self.start
        is_local = (local >= 0) & (local < self.num_real)
        return torch.where(is_local, local, 0), is_local

    def reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        if self.group.size() > 1:
            dist.all_reduce(values, op, group=self.group)
        return values


def _chunk_logprobs(
    shard: _Shard, hidden: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """logp, entropy and log-normaliser of one chunk, float32 [chunk] each."""
    logits = shard.logits(hidden)
    local, is_local = shard.local(targets)
    top = shard.reduce(logits.amax(dim=1), dist.ReduceOp.MAX)
    weights = (logits - top[:, None]).exp_()
    target_logit = logits.gather(1, local[:, None]).squeeze(1)
    sums = torch.stack(
        (
            weights.sum(dim=1),
            torch.where(is_local, target_logit, 0.0),
            (weights * logits.masked_fill_(logits == -torch.inf, 0.0)).sum(dim=1),
        )
    )
    total, target_logit, weighted_logits = shard.reduce(sums)
    log_z = top + total.log()
    return target_logit - log_z, log_z - weighted_logits / total, log_z


def _chunks(num_tokens: int, vocab_per_rank: int) -> list[slice]:
    """At least one, also of no tokens: an empty micro-batch has outputs and gradients of size 0."""
    size = max(1, CHUNK_CELLS // vocab_per_rank)
    return [slice(i, min(i + size, num_tokens)) for i in range(0, max(1, num_tokens), size)]
