"""Core attention over packed sequences on plain torch, for hosts without Transformer Engine.

Megatron-Core's local `DotProductAttention` neither takes packed (THD) input nor avoids the
[T, T] score matrix. This module does both, with torch's varlen_attn on a GPU in half precision and
its scaled_dot_product_attention elsewhere, and it applies the rotary embedding itself: Megatron's
unfused rope walks packed sequences one by one.

Over context-parallel ranks it gathers the keys and values of all of them. Transformer Engine's ring
does better with memory; this one serves where there is no Transformer Engine.
"""

import inspect

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention import varlen

from megatron_nft.policy.packed_row import Bucket, PackedRow, cells_of, varlen_of

# from torch 2.12 on; benchmarks also run with earlier ones
HAS_GROUPS = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


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
        self.softmax_scale = softmax_scale
        self.is_shared = config.context_parallel_size > 1
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
        """query [N, H, D], key and value [N, KV, D] of this rank's tokens -> [N, H·D]."""
        assert packed_seq_params is not None, "the policy's rows are always packed"
        row = packed_seq_params
        if row.rope is None:
            row.rope = self._rope(row.positions, query.dtype)
        rotate = _rotate_in_one_pass if query.is_cuda else _rotate
        query, key = rotate(query, *row.rope), rotate(key, *row.rope)
        if self.is_shared:
            key, value = _gather(key, value)
        if query.is_cuda and query.dtype != torch.float32:
            return self._attend_varlen(query, key, value, row)
        return self._attend_cells(query, key, value, row)

    def _attend_cells(self, query: Tensor, key: Tensor, value: Tensor, row: PackedRow) -> Tensor:
        """[N, H·D], a rectangle of cells at a time."""
        key, value = _repeated(key, query), _repeated(value, query)
        cells = cells_of(row)
        found = [self._attend(query, key, value, bucket) for bucket in cells.buckets]
        return torch.cat(found).index_select(0, cells.scatter)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bucket: Bucket) -> Tensor:
        """One bucket's cells [S · Q, H·D]; padded cells hold values that nobody reads.

        A segment's padding comes after its tokens, so that causality alone hides it.
        """
        query, key, value = (
            x.index_select(0, cells.flatten()).view(*cells.shape, *x.shape[1:]).transpose(1, 2)
            for x, cells in ((query, bucket.queries), (key, bucket.keys), (value, bucket.keys))
        )
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=bucket.mask,
            is_causal=bucket.mask is None,
            scale=self.softmax_scale,
        )
        return out.transpose(1, 2).reshape(bucket.queries.numel(), -1)

    def _attend_varlen(self, query: Tensor, key: Tensor, value: Tensor, row: PackedRow) -> Tensor:
        """[N, H·D] by the flash kernel: no padding, no repeated heads.

        With fewer queries than keys its causal mask lets the last query see the last key.
        """
        segments = varlen_of(row)
        if segments.keys is not None:
            key, value = (x.index_select(0, segments.keys) for x in (key, value))
        if not HAS_GROUPS:
            key, value = _repeated(key, query), _repeated(value, query)
        out = varlen.varlen_attn(
            query,
            key,
            value,
            segments.cu_seqlens_q,
            segments.cu_seqlens_kv,
            segments.max_q,
            segments.max_kv,
            scale=self.softmax_scale,
            window_size=(-1, 0),
            **({"enable_gqa": True} if HAS_GROUPS else {}),
        )
        return out.flatten(1)

    def _rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = torch.outer(positions.float(), self.inv_freq.to(positions.device).float())
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [N, H, D], halves rotated (the GPT-NeoX layout that HF uses)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


# compiled at a GPU's first row: its eight passes over queries and keys become one
_rotate_in_one_pass = torch.compile(_rotate, dynamic=True)


def _repeated(x: Tensor, query: Tensor) -> Tensor:
    """Key-value heads [N, KV, D] once for each query head, [N, H, D]."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)


def _gather(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of all context-parallel ranks, one rank's row behind the other's.

    Backward adds up what every rank's queries say of them.
    """
    both = torch.stack((key, value), dim=1)
    group = parallel_state.get_context_parallel_group()
    return gather_from_sequence_parallel_region(both, group=group).unbind(1)
