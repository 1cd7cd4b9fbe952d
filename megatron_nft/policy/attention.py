"""Core attention over packed sequences on plain torch, for hosts without Transformer Engine.

Megatron-Core's local `DotProductAttention` neither takes packed (THD) input nor avoids the
[T, T] score matrix. This module does both with torch's scaled_dot_product_attention, and it
applies the rotary embedding itself: Megatron's unfused rope walks packed sequences one by one.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


@dataclass
class PackedRow(PackedSeqParams):
    """Megatron's description of a packed row, plus what our attention derives from it once.

    A bucket holds sequences of similar length, padded to the longest: a rectangle of cells.
    """

    positions: Tensor | None = None  # int64 [T], each token's position in its own sequence
    # (padded length, int64 [num_sequences · length]: the packed row's token in each cell)
    buckets: list[tuple[int, Tensor]] = field(default_factory=list)
    scatter: Tensor | None = None  # int64 [T], each token's cell among all buckets' cells
    rope: tuple[Tensor, Tensor] | None = None  # cos, sin [T, 1, D], made by the first layer


def pack_row(lengths: tuple[int, ...], device: torch.device) -> PackedRow:
    """Describe sequences of these lengths lying one behind the other in a row."""
    sizes = torch.tensor(lengths)
    ends = torch.cumsum(sizes, 0)
    starts = ends - sizes
    cu_seqlens = F.pad(ends, (1, 0)).to(torch.int32).to(device)
    longest = int(sizes.max())
    positions = torch.arange(int(ends[-1])) - torch.repeat_interleave(starts, sizes)
    buckets, scatter = _buckets(sizes, starts)
    return PackedRow(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        positions=positions.to(device),
        buckets=[(length, gather.to(device)) for length, gather in buckets],
        scatter=scatter.to(device),
    )


def _buckets(sizes: Tensor, starts: Tensor) -> tuple[list[tuple[int, Tensor]], Tensor]:
    """Group sequences so that padding inside a bucket stays below a third of its cells."""
    order = torch.argsort(sizes, stable=True)
    buckets: list[tuple[int, Tensor]] = []
    scatter = torch.empty(int(sizes.sum()), dtype=torch.int64)
    first, num_cells = 0, 0
    while first < len(order):
        members, first = _next_bucket(sizes, order, first)
        length = int(sizes[members].max())
        offsets = torch.arange(length)
        cells = starts[members, None] + torch.minimum(offsets, sizes[members, None] - 1)
        is_token = offsets < sizes[members, None]
        cell_ids = num_cells + torch.arange(cells.numel()).view_as(cells)
        scatter[cells[is_token]] = cell_ids[is_token]
        buckets.append((length, cells.flatten()))
        num_cells += cells.numel()
    return buckets, scatter


def _next_bucket(sizes: Tensor, order: Tensor, first: int) -> tuple[Tensor, int]:
    """The sequences from `first` on (shortest first) that are at most 1.5 times as long."""
    limit = sizes[order[first]] * 3 // 2
    last = int(torch.searchsorted(sizes[order], limit, right=True))
    return order[first:last], last


class PackedAttention(torch.nn.Module):
    """Causal attention within each sequence of a packed row; Megatron's core-attention contract.

    Args:
        inv_freq: float32 [D/2], the rotary frequencies of the model's own configuration.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        inv_freq: Tensor,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        assert config.context_parallel_size == 1, "context parallelism: not in this attention yet"
        self.softmax_scale = softmax_scale
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
    ) -> Tensor:
        """query [T, H, D], key and value [T, KV, D] -> [T, H·D]."""
        assert packed_seq_params is not None, "the policy's rows are always packed"
        row = packed_seq_params
        if row.rope is None:
            row.rope = self._rope(row.positions, query.dtype)
        query, key = _rotate(query, *row.rope), _rotate(key, *row.rope)
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        cells = [self._attend(query, key, value, gather, length) for length, gather in row.buckets]
        return torch.cat(cells).index_select(0, row.scatter)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, gather: Tensor, length: int
    ) -> Tensor:
        """One bucket's cells [num_sequences · length, H·D]; padded cells hold values nobody reads.

        A sequence's padding comes after its tokens, so that the causal mask alone hides it.
        """
        query, key, value = (
            x.index_select(0, gather).view(-1, length, *x.shape[1:]).transpose(1, 2)
            for x in (query, key, value)
        )
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale
        )
        return out.transpose(1, 2).reshape(gather.numel(), -1)

    def _rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = torch.outer(positions.float(), self.inv_freq.to(positions.device).float())
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [T, H, D], halves rotated (the GPT-NeoX layout that HF uses)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
