"""How Hugging Face tensors and one Megatron-Core parameter relate.

A mapping is data: names, shapes and a kind. It is read in both directions, by live models (`split`:
HF tensors to one tensor-parallel rank's shard; `join`: all ranks' shards to HF tensors) and by
files (`runs`: which HF rows a whole Megatron parameter is made of), so that files and live models
can never disagree. Names hold `{layer}` and `{expert}`, numbers from 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, product

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """What the mappings need to know of a model; a shape is a tuple of these fields' names."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int  # the model's own, without padding
    hidden: int
    ffn: int  # of one expert where there are experts
    num_experts: int = 0

    @property
    def queries(self) -> int:
        """Width of all queries of a token."""
        return self.num_heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all keys of a token, and of all values."""
        return self.num_kv_heads * self.head_dim

    def shape(self, names: Sequence[str]) -> tuple[int, ...]:
        """`("ffn", "hidden")` as numbers."""
        return tuple(getattr(self, name) for name in names)


@dataclass(frozen=True)
class Run:
    """Consecutive rows of one HF tensor, the `source`-th of a mapping's."""

    source: int
    start: int
    stop: int


def padded_vocab_size(vocab_size: int, num_ranks: int) -> int:
    """The least multiple of TP; rows beyond the model's own never reach a softmax or a file."""
    return -(-vocab_size // num_ranks) * num_ranks


@dataclass(frozen=True)
class Mapping(ABC):
    """One Megatron parameter and the HF tensors that it is made of.

    Args:
        shapes: of each HF tensor, in names of `Sizes`' fields.
    """

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[tuple[str, ...], ...]

    @abstractmethod
    def split(self, tensors: Sequence[Tensor], rank: int, num_ranks: int, sizes: Sizes) -> Tensor:
        """This rank's shard of the Megatron parameter, from the whole HF tensors."""

    @abstractmethod
    def join(self, shards: Sequence[Tensor], sizes: Sizes) -> tuple[Tensor, ...]:
        """The whole HF tensors, in the order of `hf`, from all ranks' shards."""

    def runs(self, sizes: Sizes) -> list[Run]:
        """The whole Megatron parameter's rows, without padding, from top to bottom."""
        return [Run(source, 0, shape[0]) for source, shape in enumerate(self.hf_shapes(sizes))]

    def names(self, sizes: Sizes) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The Megatron name and its HF names, for every layer and every expert."""
        layers = range(sizes.num_layers if "{layer}" in self.megatron else 1)
        experts = range(sizes.num_experts if self.is_expert else 1)
        for layer, expert in product(layers, experts):
            place = {"layer": layer, "expert": expert}
            yield self.megatron.format(**place), tuple(name.format(**place) for name in self.hf)

    def hf_shapes(self, sizes: Sizes) -> list[tuple[int, ...]]:
        """The shape of each HF tensor."""
        return [sizes.shape(shape) for shape in self.shapes]

    def megatron_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """The shape of the whole Megatron parameter, without padding."""
        shapes = self.hf_shapes(sizes)
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    @property
    def is_expert(self) -> bool:
        """True where there is one such parameter for each expert."""
        return "{expert}" in self.megatron


@dataclass(frozen=True)
class Replicated(Mapping):
    """The same tensor on every rank: norms, the router."""

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
        return (torch.cat(tuple(shards))[: sizes.vocab],)


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

    def runs(self, sizes: Sizes) -> list[Run]:
        widths = (sizes.queries // sizes.num_kv_heads, sizes.head_dim, sizes.head_dim)
        return [
            Run(source, group * width, (group + 1) * width)
            for group in range(sizes.num_kv_heads)
            for source, width in enumerate(widths)
        ]


def tops(runs: Sequence[Run]) -> list[int]:
    """Where each run begins among the Megatron parameter's rows."""
    return list(accumulate((run.stop - run.start for run in runs[:-1]), initial=0))
