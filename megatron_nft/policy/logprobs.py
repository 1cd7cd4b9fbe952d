"""Hidden states to log-probabilities of given tokens, through the vocabulary shards.

Logits live chunk by chunk in one buffer, which may in turn hold the exponentials and the gradient:
nothing of size [tokens, vocabulary] outlives its chunk. A loss that is separable per token has its
gradient taken while the chunk is there, so that training costs three matmuls; any other loss makes
the logits again in backward, a fourth. On a GPU, Triton kernels pass over the logits. Reached
through GPTModel's `output_processor` hook.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_nft.policy import host, softmax_kernels

# Float32 logits alive at a time on a rank: 128 MiB, on CUDA 1 GiB; 220 and 1,760 tokens of 152k
# rows. A chunk of C tokens reads and writes main_grad once, which is C / 4 operations per byte: far
# above the 10 that a CPU does in the time of a byte, and above the 180 to 250 of a Hopper GPU (on
# an H200 half as many cells took 1.2 × the time, twice as many the same). More tokens than
# MAX_CHUNK_TOKENS, where there are few rows, would cost memory for nothing.
CHUNK_CELLS = 2**28 if host.has_cuda() else 2**25
MAX_CHUNK_TOKENS = 4096

Gradient = Callable[[Tensor, slice], Tensor]


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    with_entropy: bool = False,
    gradient: Gradient | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden · weightᵀ / temperature)[target] and the distribution's entropy.

    The gradient of `hidden` is this rank's share alone, that of its vocabulary rows. The caller has
    the shares added up as around Megatron's ColumnParallelLinear: it takes `hidden` from
    copy_to_tensor_model_parallel_region or gather_from_sequence_parallel_region.

    The gradient of `weight` is added up in float32. Where DistributedDataParallel gave the weight a
    `main_grad`, it goes there and autograd gets None: DDP's hook then adds only what other uses of
    a tied weight left in `grad` (grad_added_to_main_grad stays False). With overlap_grad_reduce
    that hook refuses a weight without `grad`: not supported.

    Args:
        hidden: [T, H], whole on every tensor-parallel rank, any float dtype.
        weight: [V/TP, H] of that dtype, this rank's rows of the head; rows at and past
            `vocab_size` are padding: they take no probability and get no gradient.
        targets: int64 [T], global token ids.
        gradient: (logp of some rows of T, those rows) -> d loss / d logp, all float32 [C]. Promises
            what backward will be given, so that forward makes the gradients and adds to
            `main_grad`: each such forward needs its backward. Called in order, in no-grad mode, at
            least once (of no rows if T is 0); not at all where no gradient is wanted.

    Returns:
        logp float32 [T] (differentiable in hidden and weight) and, if asked for, entropy float32
        [T] (in nats, not differentiable), the same on every tensor-parallel rank.

    Raises:
        RuntimeError: in backward, the promise is broken (on CUDA asynchronously).
    """
    group = parallel_state.get_tensor_model_parallel_group()
    call = _Call(temperature, vocab_size, with_entropy, gradient, group)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _TokenLogprobs.apply(hidden, weight, targets, call)
    logp, _, _, *entropy = _forward(_Head(weight.detach(), call), hidden.detach(), targets)
    return logp, entropy[0] if with_entropy else None


class _Call(NamedTuple):
    """The options of a call, and the tensor-parallel group."""

    temperature: float
    vocab_size: int
    with_entropy: bool
    gradient: Gradient | None
    group: dist.ProcessGroup


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, targets: Tensor, call: _Call
    ) -> tuple[Tensor, Tensor | None]:
        ctx.call, ctx.main_grad = call, getattr(weight, "main_grad", None)
        head = _Head(weight, call)
        grads = _Gradients(ctx, head, hidden, targets) if call.gradient else None
        logp, top, total, *entropy = _forward(head, hidden, targets, grads)
        if grads:
            ctx.save_for_backward(torch.cat(grads.of_logp), *grads.for_autograd())
        else:
            ctx.save_for_backward(hidden, weight, targets, top, total)
        ctx.mark_non_differentiable(*entropy)
        return logp, entropy[0] if call.with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad_logp: Tensor, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if ctx.call.gradient:
            promised, *grads = ctx.saved_tensors
            torch._assert_async(_is_kept(promised, grad_logp), "not the gradient that was promised")
        else:
            grads = _recomputed(ctx, grad_logp)
        return *grads, None, None


def _forward(
    head: "_Head", hidden: Tensor, targets: Tensor, grads: "_Gradients | None" = None
) -> list[Tensor]:
    """What `_combine` returns, over all chunks; promised gradients go to `grads`."""
    parts = []
    for rows in head.chunks(len(hidden)):
        exps, own = head.exponentials(hidden[rows], targets[rows])
        parts.append(_combine(head.gather(own)))
        if grads is not None:
            logp, top, total, *_ = parts[-1]
            scale = (own[0] - top).exp_() / total
            grads.add(rows, exps, scale, head.call.gradient(logp, rows))
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def _recomputed(ctx: FunctionCtx, grad_logp: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of hidden and weight, from logits made again."""
    hidden, weight, targets, top, total = ctx.saved_tensors
    head = _Head(weight, ctx.call)
    grads = _Gradients(ctx, head, hidden, targets)
    for rows in head.chunks(len(hidden)):
        exps = _exponentials(head.logits(hidden[rows]), top[rows])
        grads.add(rows, exps, 1.0 / total[rows], grad_logp[rows])
    return grads.for_autograd()


class _Exponentials(NamedTuple):
    """exp(values − top); the values themselves where no top is given."""

    values: Tensor  # [C, V]
    top: Tensor | None  # [C]


def _exponentials(logits: Tensor, top: Tensor) -> _Exponentials:
    """exp(logits − top) in place, which a kernel puts off until it needs them."""
    if _has_kernels(logits):
        return _Exponentials(logits, top)
    return _Exponentials(logits.sub_(top[:, None]).exp_(), None)


class _Gradients:
    """What the chunks' gradients are put into: `hidden`'s rows, and main_grad or a buffer."""

    def __init__(self, ctx: FunctionCtx, head: "_Head", hidden: Tensor, targets: Tensor) -> None:
        self.head, self.hidden, self.targets = head, hidden, targets
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        self.of_logp: list[Tensor] = []
        self.of_hidden = torch.empty_like(hidden) if wants_hidden else None
        self.of_weight = self.main_grad = ctx.main_grad if wants_weight else None
        if wants_weight and self.main_grad is None:
            self.of_weight = hidden.new_zeros(head.num_rows, hidden.shape[1], dtype=torch.float32)

    def add(self, rows: slice, exps: _Exponentials, scale: Tensor, grad_logp: Tensor) -> None:
        """Of one chunk, whose softmax is exps · scale; overwrites exps."""
        self.of_logp.append(grad_logp)
        grad = self.head.grad_logits(exps, scale, self.targets[rows], grad_logp)
        if self.of_hidden is not None:
            torch.mm(grad, self.head.weight, out=self.of_hidden[rows])
        if self.of_weight is not None:
            _addmm(self.of_weight[: self.head.num_real], grad.t(), self.hidden[rows])

    def for_autograd(self) -> tuple[Tensor | None, Tensor | None]:
        """Of hidden, and of the weight in its dtype unless main_grad has it."""
        if self.of_weight is None or self.main_grad is not None:
            return self.of_hidden, None
        return self.of_hidden, self.of_weight.to(self.head.weight.dtype)


class _Head:
    """This rank's rows of the head, [start, start + num_real) of the vocabulary, and its buffer."""

    def __init__(self, weight: Tensor, call: _Call) -> None:
        self.call, self.num_rows = call, weight.shape[0]
        self.start = call.group.rank() * self.num_rows
        self.num_real = max(0, min(self.num_rows, call.vocab_size - self.start))
        self.weight = weight[: self.num_real]

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        """At least one: no tokens have outputs and gradients too, of size 0."""
        size = max(1, min(CHUNK_CELLS // self.num_rows, MAX_CHUNK_TOKENS))
        # once for all chunks: on a CPU, fresh pages take nearly as long as a pass over them
        self.buffer = self._empty(min(size, num_tokens), torch.float32)
        if self.call.with_entropy and not _has_kernels(self.buffer):
            self.scratch = self._empty(max(1, len(self.buffer) // 8), torch.float32)
        for start in range(0, max(1, num_tokens), size):
            yield slice(start, min(start + size, num_tokens))

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [C, num_real], in the buffer."""
        logits = self.buffer[: len(hidden)]
        if hidden.dtype == torch.float32 or _has_float32_products(hidden):
            alpha = 1.0 / self.call.temperature
            return _addmm(logits, hidden, self.weight.t(), beta=0.0, alpha=alpha)
        logits.copy_(hidden @ self.weight.t())
        return logits if self.call.temperature == 1.0 else logits.div_(self.call.temperature)

    def exponentials(self, hidden: Tensor, targets: Tensor) -> tuple[_Exponentials, Tensor]:
        """exp(logits − top), in the buffer, and this shard's statistics, float32 [3 or 4, C].

        These are: top, Σ exp, the target's logit (0 where it is another shard's), Σ exp · log exp.
        """
        logits = self.logits(hidden)
        if not self.num_real:
            own = logits.new_zeros(3 + self.call.with_entropy, len(hidden))
            own[0] = -torch.inf
            return _Exponentials(logits, None), own
        columns, is_local = self._columns(targets)
        if _has_kernels(logits):
            own = softmax_kernels.statistics(logits, columns, is_local, self.call.with_entropy)
            return _exponentials(logits, own[0]), own
        target_logit = torch.where(is_local, logits.gather(1, columns)[:, 0], 0.0)
        top = logits.amax(dim=1)
        exps = _exponentials(logits, top)
        own = [top, exps.values.sum(dim=1), target_logit]
        if self.call.with_entropy:
            parts = exps.values.split(len(self.scratch))
            own.append(torch.cat([self._plogp(part) for part in parts]))
        return exps, torch.stack(own)

    def _plogp(self, exps: Tensor) -> Tensor:
        """Σ exp · log exp of some rows; the products need memory of their own."""
        return torch.xlogy(exps, exps, out=self.scratch[: len(exps)]).sum(dim=1)

    def grad_logits(
        self, exps: _Exponentials, scale: Tensor, targets: Tensor, grad_logp: Tensor
    ) -> Tensor:
        """grad_logp / temperature · (onehot(target) − exps · scale), in the weight's dtype.

        In place where that is float32, and always by the kernel. The target's column is rounded
        last, since one minus a probability near one would lose everything.
        """
        grad_logp = grad_logp / self.call.temperature
        scale = (grad_logp * scale).neg_()
        values, dtype = exps.values, self.weight.dtype
        columns, is_local = self._columns(targets)
        if exps.top is not None:
            place = columns, is_local
            return softmax_kernels.gradient(values, exps.top, scale, grad_logp, *place, dtype)
        grad = values if dtype == values.dtype else self._empty(len(values), dtype)
        if not self.num_real:
            return grad
        at_target = torch.where(is_local, grad_logp, 0.0) + scale * values.gather(1, columns)[:, 0]
        torch.mul(values, scale[:, None], out=grad)
        return grad.scatter_(1, columns, at_target[:, None].to(dtype))

    def gather(self, own: Tensor) -> Tensor:
        """Every shard's [K, C] as [TP, K, C], the same on every rank."""
        if self.call.group.size() == 1:
            return own[None]
        shards = own.new_empty(self.call.group.size(), *own.shape)
        dist.all_gather(list(shards), own, group=self.call.group)
        return shards

    def _columns(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Targets as columns [C, 1] of this shard, any for another's; which are its own [C]."""
        columns = targets - self.start
        is_local = (columns >= 0) & (columns < self.num_real)
        return torch.where(is_local, columns, 0)[:, None], is_local

    def _empty(self, num_tokens: int, dtype: torch.dtype) -> Tensor:
        """[num_tokens, num_real], with rows aligned as those of the padded vocabulary are.

        The columns of the padding are 0: on CPUs a product in bf16 reads them too (torch 2.13, by
        oneDNN), and 0 · NaN is NaN.
        """
        padded = self.weight.new_empty(num_tokens, self.num_rows, dtype=dtype)
        padded[:, self.num_real :].zero_()
        return padded[:, : self.num_real]


def _combine(shards: Tensor) -> tuple[Tensor, ...]:
    """Shards' statistics [TP, K, C] -> logp, top, Σ exp(logits − top) and any entropy, [C] each."""
    tops, totals, target_logits, *plogps = shards.unbind(1)
    top = tops.amax(dim=0)
    scales = (tops - top).exp_()
    total = (scales * totals).sum(dim=0)
    log_total = total.log()
    logp = target_logits.sum(dim=0) - top - log_total
    # exp(x) · x summed up, from each shard's own top to the common one
    sums = [scales * plogp + torch.xlogy(scales, scales) * totals for plogp in plogps]
    return logp, top, total, *(log_total - s.sum(dim=0) / total for s in sums)


def _has_float32_products(factor: Tensor) -> bool:
    """Whether torch multiplies this dtype into float32: the out_dtype overloads are CUDA's."""
    return factor.is_cuda and factor.dtype in (torch.bfloat16, torch.float16)


def _has_kernels(logits: Tensor) -> bool:
    return logits.is_cuda and logits.numel() > 0


def _addmm(out: Tensor, a: Tensor, b: Tensor, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """out = beta · out + alpha · a b, in place, in float32 for a and b of any dtype."""
    if _has_float32_products(a):
        return torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, alpha=alpha, out=out)
    return torch.addmm(out, a.float(), b.float(), beta=beta, alpha=alpha, out=out)


def _is_kept(promised: Tensor, given: Tensor) -> Tensor:
    """Whether d loss / d logp is what was promised, NaN for NaN: bool [].

    The caller may round differently over all tokens at once, and an objective's cancellations
    magnify that; a promise that is wrong is wrong by far more.
    """
    is_close = torch.isclose(given, promised, rtol=1e-3, atol=0.0, equal_nan=True)
    return (is_close | ((given - promised).abs() <= 1e-6 * promised.norm())).all()
