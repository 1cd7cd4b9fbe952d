"""How Hugging Face tensors and one Megatron-Core parameter's shards relate.

A mapping is data: two names and a kind. It is read in both directions, `split` (HF tensors to
one tensor-parallel rank's shard) and `join` (all ranks' shards to HF tensors), so that files and
live models can never disagree. Names hold `{layer}`, the layer's number from 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """What the mappings need to know of a model."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # the model's own, without padding


def padded_vocab_size(vocab_size: int, num_ranks: int) -> int:
    """The least multiple of TP; rows beyond the model's own never reach a softmax or a file."""
    return -(-vocab_size // num_ranks) * num_ranks


@dataclass(frozen=True)
class Mapping(ABC):
    megatron: str
    hf: tuple[str, ...]

    @abstractmethod
    def split(self, tensors: Sequence[Tensor], rank: int, num_ranks: int, sizes: Sizes) -> Tensor:
        """This rank's shard of the Megatron parameter, from the whole HF tensors."""

    @abstractmethod
    def join(self, shards: Sequence[Tensor], sizes: Sizes) -> tuple[Tensor, ...]:
        """The whole HF tensors, in the order of `hf`, from all ranks' shards."""

    def names(self, layer: int) -> tuple[str, tuple[str, ...]]:
        """The Megatron name and the HF names in this layer."""
        return self.megatron.format(layer=layer), tuple(n.format(layer=layer) for n in self.hf)

    @property
    def in_every_layer(self) -> bool:
        return "{layer}" in self.megatron


@dataclass(frozen=True)
class Replicated(Mapping):
    """The same tensor on every rank: norms."""

    def split(self, tensors: Sequence[Tensor], rank: int, num_ranks: int, sizes: Sizes) -> Tensor:
        return tensors[0]

    def join(self, shards: Sequence[Tensor], sizes: Sizes) -> tuple[Tensor, ...]:
        return (shards[0],)


@dataclass(frozen=True)
class Row(Mapping):
    """Input features split over the ranks: attention output, MLP down projection."""

    def split(self, tensors: Sequence[Tensor], rank: int, num_ranks: int, sizes: Sizes) -> Tensor:
        return tensors[0].chunk(num_ranks, dim=1)[rank]

    def join(self, shards: Sequence[Tensor], sizes: Sizes) -> tuple[Tensor, ...]:
        return (torch.cat(tuple(shards), dim=1),)


@dataclass(frozen=True)
class Vocabulary(Mapping):
    """Rows of the embedding or the head; padded with zeros to a multiple of the ranks."""

    def split(self, tensors: Sequence[Tensor], rank: int, num_ranks: int, sizes: Sizes) -> Tensor:
        (whole,) = tensors
        padding = padded_vocab_size(whole.shape[0], num_ranks) - whole.shape[0]
        return F.pad(whole, (0, 0, 0, padding)).chunk(num_ranks)[rank]

    def join(self, shards: Sequence[Tensor], sizes: Sizes) -> tuple[Tensor, ...]:
        return (torch.cat(tuple(shards))[: sizes.vocab_size],)


@dataclass(frozen=True)
class GateUp(Mapping):
    """Gate and up projections: each rank holds its gate rows above its up rows."""

    def split(self, tensors: Sequence[Tensor], rank: int, num_ranks: int, sizes: Sizes) -> Tensor:
        return torch.cat([tensor.chunk(num_ranks)[rank] for tensor in tensors])

    def join(self, shards: Sequence[Tensor], sizes: Sizes) -> tuple[Tensor, ...]:
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat(gates), torch.cat(ups)


@dataclass(frozen=True)
class QKV(Mapping):
    """Query, key and value (weights or biases), interleaved by key-value head.

    Megatron's rows run head by head: the queries that share a key-value head, its key, its value.
    """

    def split(self, tensors: Sequence[Tensor], rank: int, num_ranks: int, sizes: Sizes) -> Tensor:
        groups = [
            tensor.view(sizes.num_kv_heads, -1, sizes.head_dim, *tensor.shape[1:])
            for tensor in tensors
        ]
        shard = torch.cat(groups, dim=1).chunk(num_ranks)[rank]
        return shard.reshape(-1, *tensors[0].shape[1:])

    def join(self, shards: Sequence[Tensor], sizes: Sizes) -> tuple[Tensor, ...]:
        whole = torch.cat(tuple(shards))
        queries = sizes.num_heads // sizes.num_kv_heads
        groups = whole.view(sizes.num_kv_heads, queries + 2, sizes.head_dim, *whole.shape[1:])
        return tuple(
            part.reshape(-1, *whole.shape[1:]) for part in groups.split((queries, 1, 1), dim=1)
        )
