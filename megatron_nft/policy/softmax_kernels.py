"""The head's passes over its logits on a GPU: two Triton kernels, each of which reads them once.

A cell of the logits costs 6 H operations in the three matmuls, which an H100 does in the time of
about 80 bytes at H = 3584, and every pass of a tensor operation over float32 logits is 4 or 8 of
them: the ten or so of policy/logprobs.py on plain torch take half as long as the matmuls again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 8192  # columns that a program holds at a time


def statistics(logits: Tensor, columns: Tensor, is_local: Tensor, with_entropy: bool) -> Tensor:
    """float32 [3 or 4, C] of float32 logits [C, V], whose rows may be further apart than V.

    top, Σ exp(x − top), the logit of the column (0 where not local), Σ exp(x − top) · (x − top).
    """
    num_rows, num_columns = logits.shape
    out = logits.new_empty(3 + with_entropy, num_rows)
    _statistics[(num_rows,)](
        logits,
        columns,
        is_local,
        out,
        num_rows,
        num_columns,
        logits.stride(0),
        WITH_ENTROPY=with_entropy,
        BLOCK=_block(num_columns),
        num_warps=16,
    )
    return out


def gradient(
    logits: Tensor,
    top: Tensor,
    scale: Tensor,
    at_target: Tensor,
    columns: Tensor,
    is_local: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """[C, V] in the memory of float32 logits: scale · exp(logits − top), rounded to dtype.

    With at_target added in the column of a local row, before it is rounded.
    """
    num_rows, num_columns = logits.shape
    out = logits.view(dtype)[:, :num_columns]
    _gradient[(num_rows,)](
        logits,
        top,
        scale,
        at_target,
        columns,
        is_local,
        out,
        num_columns,
        logits.stride(0),
        out.stride(0),
        BLOCK=_block(num_columns),
        num_warps=16,
    )
    return out


def _block(num_columns: int) -> int:
    return min(MAX_BLOCK, triton.next_power_of_2(num_columns))


@triton.jit
def _statistics(
    logits,
    columns,
    is_local,
    out,
    num_rows,
    num_columns,
    stride,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one row a program; sums move on to a new top as it is met."""
    row = tl.program_id(0)
    values = logits + row.to(tl.int64) * stride
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    weighted = tl.full((), 0.0, tl.float32)
    for start in range(0, num_columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        x = tl.load(values + offsets, offsets < num_columns, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 0))
        x = x - new_top
        exps = tl.exp(x)
        step = tl.where(total > 0, top - new_top, 0.0)  # of the first block nothing is there yet
        factor = tl.exp(step)
        if WITH_ENTROPY:
            terms = tl.where(exps > 0, exps * x, 0.0)
            weighted = factor * (weighted + total * step) + tl.sum(terms, 0)
        total = factor * total + tl.sum(exps, 0)
        top = new_top
    own = tl.load(is_local + row)
    target = tl.load(values + tl.load(columns + row), own, 0.0)
    tl.store(out + row, top)
    tl.store(out + num_rows + row, total)
    tl.store(out + 2 * num_rows + row, target)
    if WITH_ENTROPY:
        tl.store(out + 3 * num_rows + row, weighted)


@triton.jit
def _gradient(
    logits,
    top,
    scale,
    at_target,
    columns,
    is_local,
    out,
    num_columns,
    stride,
    out_stride,
    BLOCK: tl.constexpr,
):
    """Of one row a program, from the left: no block is written over before it is read."""
    row = tl.program_id(0)
    values = logits + row.to(tl.int64) * stride
    grads = out + row.to(tl.int64) * out_stride
    shift, factor = tl.load(top + row), tl.load(scale + row)
    target = tl.load(columns + row)
    extra = tl.where(tl.load(is_local + row), tl.load(at_target + row), 0.0)
    for start in range(0, num_columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < num_columns
        x = tl.load(values + offsets, inside, 0.0)
        tl.debug_barrier()  # until all threads have read the block, whose memory is written to
        grad = factor * tl.exp(x - shift) + tl.where(offsets == target, extra, 0.0)
        tl.store(grads + offsets, grad.to(out.dtype.element_ty), inside)
