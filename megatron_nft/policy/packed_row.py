"""How sequences lie in a packed row, over context-parallel ranks too.

Each of C context-parallel ranks holds two of the 2·C equal chunks of every sequence, the r-th from
the front and the r-th from the back (Megatron's and Transformer Engine's zigzag), so that causal
attention costs every rank the same. The row of a rank is its share of all sequences, one behind the
other; with one rank, the sequences whole.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Runs of this rank's queries that each see keys from their sequence's start to their own.

    int64 [S] each. Queries are counted in this rank's row, keys in the whole row.
    """

    q_starts: Tensor
    q_sizes: Tensor
    kv_starts: Tensor
    kv_sizes: Tensor


@dataclass(frozen=True)
class Bucket:
    """Segments with about as many keys each, padded to the longest: a rectangle of cells."""

    queries: Tensor  # int64 [S, Q], the token of this rank's row in each cell
    keys: Tensor  # int64 [S, K], the token of the gathered rows in each cell
    mask: Tensor | None  # bool [S, 1, Q, K], what may be seen; None: queries are keys, causally


@dataclass(frozen=True)
class Varlen:
    """The same segments for a kernel that takes them as they are: torch's varlen_attn."""

    cu_seqlens_q: Tensor  # int32 [S+1]
    cu_seqlens_kv: Tensor  # int32 [S+1]
    max_q: int
    max_kv: int
    keys: Tensor | None  # int64, the tokens of the gathered rows in the segments' order


@dataclass(frozen=True)
class Cells:
    """All segments in buckets, for a kernel that takes rectangles."""

    buckets: list[Bucket]
    scatter: Tensor  # int64 [N], each token's cell among all buckets' query cells


@dataclass
class PackedRow(PackedSeqParams):
    """Megatron's description of a packed row, and ours of this rank's share.

    The last three are made by the first layer that needs them.
    """

    positions: Tensor | None = None  # int64 [N], each of this rank's tokens in its own sequence
    tokens: Tensor | None = None  # int64 [N], where in the whole row this rank's tokens lie
    segments: Segments | None = None
    gathered: Tensor | None = None  # int64, where gathered rows have the whole row's tokens
    rope: tuple[Tensor, Tensor] | None = None  # cos, sin [N, 1, D]
    cells: Cells | None = None
    varlen: Varlen | None = None


def pack_row(
    lengths: tuple[int, ...], device: torch.device, rank: int = 0, num_ranks: int = 1
) -> PackedRow:
    """Describe context-parallel rank `rank`'s share of sequences of these lengths.

    With several ranks every length is a multiple of 2 · num_ranks.
    """
    sizes = torch.tensor(lengths)
    starts = torch.cumsum(sizes, 0) - sizes
    shares = [_zigzag(sizes, starts, number, num_ranks) for number in range(num_ranks)]
    positions = shares[rank] - torch.repeat_interleave(starts, sizes)[shares[rank]]
    cu_seqlens = _cumulative(sizes).to(device)
    return PackedRow(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=int(sizes.max()),
        max_seqlen_kv=int(sizes.max()),
        positions=positions.to(device),
        tokens=shares[rank],
        segments=_segments(sizes, starts, rank, num_ranks),
        gathered=torch.argsort(torch.cat(shares)) if num_ranks > 1 else None,
    )


def cells_of(row: PackedRow) -> Cells:
    """The row's segments as rectangles, on the row's device; made once."""
    if row.cells is None:
        row.cells = _cells_of(row.segments, row.gathered, row.positions.device)
    return row.cells


def varlen_of(row: PackedRow) -> Varlen:
    """The row's segments one behind the other, on the row's device; made once."""
    if row.varlen is None:
        row.varlen = _varlen_of(row.segments, row.gathered, row.positions.device)
    return row.varlen


def _zigzag(sizes: Tensor, starts: Tensor, rank: int, num_ranks: int) -> Tensor:
    """The tokens of the whole row that this rank holds, int64 [N]."""
    if num_ranks == 1:
        return torch.arange(int(sizes.sum()))
    assert not (sizes % (2 * num_ranks)).any(), f"{sizes.tolist()} over {num_ranks} ranks"
    chunks = sizes // (2 * num_ranks)
    firsts = torch.stack((starts + rank * chunks, starts + (2 * num_ranks - 1 - rank) * chunks), 1)
    return _ranges(firsts.flatten(), chunks.repeat_interleave(2))


def _segments(sizes: Tensor, starts: Tensor, rank: int, num_ranks: int) -> Segments:
    if num_ranks == 1:
        return Segments(starts, sizes, starts, sizes)
    chunks = sizes // (2 * num_ranks)
    seen = torch.stack(((rank + 1) * chunks, (2 * num_ranks - rank) * chunks), 1).flatten()
    chunks = chunks.repeat_interleave(2)
    return Segments(torch.cumsum(chunks, 0) - chunks, chunks, starts.repeat_interleave(2), seen)


def _cells_of(segments: Segments, gathered: Tensor | None, device: torch.device) -> Cells:
    """Group segments so that padding stays below a third of a bucket's keys."""
    order = torch.argsort(segments.kv_sizes, stable=True)
    scatter = torch.empty(int(segments.q_sizes.sum()), dtype=torch.int64)
    buckets: list[Bucket] = []
    num_cells = 0
    for first, last in pairwise(_cuts(segments.kv_sizes[order])):
        members = order[first:last]
        q_sizes, kv_sizes = segments.q_sizes[members], segments.kv_sizes[members]
        queries, is_query = _rectangle(segments.q_starts[members], q_sizes)
        keys, _ = _rectangle(segments.kv_starts[members], kv_sizes)
        cell_ids = num_cells + torch.arange(queries.numel()).view_as(queries)
        scatter[queries[is_query]] = cell_ids[is_query]
        num_cells += queries.numel()
        mask = None
        if gathered is not None:
            mask = _mask(q_sizes, kv_sizes, queries.shape[1], keys.shape[1]).to(device)
            keys = gathered[keys]
        buckets.append(Bucket(queries.to(device), keys.to(device), mask))
    return Cells(buckets, scatter.to(device))


def _cuts(sizes: Tensor) -> list[int]:
    """Where to cut ascending sizes so that none is over 1.5 times the first of its part."""
    cuts = [0]
    while cuts[-1] < len(sizes):
        limit = sizes[cuts[-1]] * 3 // 2
        cuts.append(int(torch.searchsorted(sizes, limit, right=True)))
    return cuts


def _rectangle(starts: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """A run's tokens in each row, the last one repeated to the longest; which are no repetition."""
    offsets = torch.arange(int(sizes.max()))
    return starts[:, None] + torch.minimum(offsets, sizes[:, None] - 1), offsets < sizes[:, None]


def _mask(q_sizes: Tensor, kv_sizes: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """The last query sees the last key; a segment's padding lies behind what its tokens see."""
    last_seen = torch.arange(num_queries) + (kv_sizes - q_sizes)[:, None]
    return (torch.arange(num_keys) <= last_seen[:, :, None]).unsqueeze(1)


def _varlen_of(segments: Segments, gathered: Tensor | None, device: torch.device) -> Varlen:
    keys = None
    if gathered is not None:
        keys = gathered[_ranges(segments.kv_starts, segments.kv_sizes)].to(device)
    return Varlen(
        cu_seqlens_q=_cumulative(segments.q_sizes).to(device),
        cu_seqlens_kv=_cumulative(segments.kv_sizes).to(device),
        max_q=int(segments.q_sizes.max()),
        max_kv=int(segments.kv_sizes.max()),
        keys=keys,
    )


def _ranges(firsts: Tensor, sizes: Tensor) -> Tensor:
    """first, first + 1, … of every run, one run behind the other."""
    before = torch.cumsum(sizes, 0) - sizes
    return torch.arange(int(sizes.sum())) + torch.repeat_interleave(firsts - before, sizes)


def _cumulative(sizes: Tensor) -> Tensor:
    return F.pad(torch.cumsum(sizes, 0), (1, 0)).to(torch.int32)
