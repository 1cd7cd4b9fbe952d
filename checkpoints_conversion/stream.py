"""A live, sharded model as a stream of whole tensors under their Hugging Face names."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PretrainedConfig

from checkpoints_conversion.buckets import BUCKET_BYTES, buckets
from checkpoints_conversion.families import mappings_for, sizes_of
from checkpoints_conversion.live import named_parameters, tensor_group
from checkpoints_conversion.mapping import Mapping, Sizes


@dataclass(frozen=True)
class Home:
    """Where a parameter lives: the ranks that hold its shards, and these shards' shape."""

    stage: int  # pipeline rank
    expert_rank: int  # expert-parallel; all of them hold what is no expert
    shape: torch.Size


@dataclass(frozen=True)
class Item:
    """One Megatron parameter and the names of the tensors that it becomes."""

    mapping: Mapping
    name: str
    hf_names: tuple[str, ...]
    home: Home

    @property
    def route(self) -> tuple[bool, int, int]:
        """What travels together: expert or not, from the same ranks."""
        is_expert = self.mapping.is_expert
        return is_expert, self.home.stage, self.home.expert_rank if is_expert else 0


def stream(
    chunks: Sequence[GPTModel], hf_config: PretrainedConfig, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[tuple[str, Tensor]]:
    """The weights of the live model; see stream_of."""
    return stream_of(named_parameters(chunks), hf_config, bucket_bytes)


@torch.no_grad()
def stream_of(
    parameters: dict[str, Tensor], hf_config: PretrainedConfig, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) layer by layer, a layer's in its table's order, on every rank.

    Of all parameters by the names that live.named_parameters gives them, or of their gradients.

    Collective: all ranks of the tensor-, pipeline- and expert-parallel groups iterate together, to
    the end. Parameters are gathered in buckets of at most `bucket_bytes` of whole tensors (a larger
    one alone), so that the extra memory is at most twice that, and one joined parameter; a rank
    that shares its model with none yields its own memory. Tensors may be parts of a bucket, which
    lives as long as any of them.
    """
    sizes = sizes_of(hf_config)
    homes = _homes(parameters)
    like = next(iter(parameters.values())).detach()  # all have one dtype and one device
    items = [
        Item(mapping, name, hf_names, homes[name])
        for mapping, name, hf_names in in_layers(mappings_for(hf_config), sizes)
    ]
    whole_bytes = [
        prod(i.home.shape) * tensor_group(i.mapping).size() * like.itemsize for i in items
    ]
    for bucket in buckets(whole_bytes, bucket_bytes):
        shards = _gather_all(items[bucket], parameters, like)
        for item in items[bucket]:
            shards_of_item = shards.pop(item.name)
            yield from zip(item.hf_names, item.mapping.join(shards_of_item, sizes), strict=True)
        del shards_of_item  # its bucket goes before the next comes


def in_layers(
    mappings: Sequence[Mapping], sizes: Sizes
) -> Iterator[tuple[Mapping, str, tuple[str, ...]]]:
    """Every parameter's mapping, name and HF names, layer by layer.

    An engine keeps what has come of a layer until it has the whole: not those of all layers.
    """
    for has_layers, group in groupby(mappings, key=lambda mapping: "{layer}" in mapping.megatron):
        rows = [[(mapping, *names) for names in mapping.names(sizes)] for mapping in group]
        num_layers = sizes.num_layers if has_layers else 1
        for layer in range(num_layers):
            for row in rows:
                num = len(row) // num_layers  # experts
                yield from row[layer * num : (layer + 1) * num]


def _homes(parameters: dict[str, Tensor]) -> dict[str, Home]:
    """Where each parameter lives; the same on all ranks."""
    mine = {name: parameter.shape for name, parameter in parameters.items()}
    in_stage = _on_every_rank(mine, parallel_state.get_expert_model_parallel_group())
    stages = _on_every_rank(in_stage, parallel_state.get_pipeline_model_parallel_group())
    return {
        name: Home(stage, expert_rank, shape)
        for stage, expert_ranks in enumerate(stages)
        for expert_rank, held in enumerate(expert_ranks)
        for name, shape in held.items()
    }


def _gather_all(
    bucket: Sequence[Item], parameters: dict[str, Tensor], like: Tensor
) -> dict[str, list[Tensor]]:
    """The shards of every parameter, by its name: one journey for all that share a route."""
    routes = defaultdict(list)
    for item in bucket:
        routes[item.route].append(item)
    return dict(chain.from_iterable(_gather(items, parameters, like) for items in routes.values()))


def _gather(
    items: Sequence[Item], parameters: dict[str, Tensor], like: Tensor
) -> list[tuple[str, list[Tensor]]]:
    """The shards of parameters of one route."""
    first, shapes = items[0], [item.home.shape for item in items]
    lengths = [prod(shape) for shape in shapes]
    mine = [parameters[i.name].detach().reshape(-1) for i in items if i.name in parameters]
    group = tensor_group(first.mapping)
    if group.size() == 1 and not _travels(first.mapping):
        whole = [[part] for part in mine]
    else:
        flat = torch.cat(mine) if len(mine) > 1 else next(iter(mine), None)
        flat = like.new_empty(sum(lengths)) if flat is None else flat
        rows = _on_all_shares(_from_home(flat, first), group)
        whole = list(zip(*(row.split(lengths) for row in rows), strict=True))
    return [
        (item.name, [part.view(shape) for part in parts])
        for item, shape, parts in zip(items, shapes, whole, strict=True)
    ]


def _travels(mapping: Mapping) -> bool:
    """Whether some rank lacks the parameters of this kind that another has."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    experts = parallel_state.get_expert_model_parallel_world_size()
    return stages > 1 or (mapping.is_expert and experts > 1)


def _from_home(flat: Tensor, item: Item) -> Tensor:
    """The shard of the ranks that hold it, on all: over the stage that it is in, then to others."""
    stages = parallel_state.get_pipeline_model_parallel_group()
    if item.mapping.is_expert and stages.rank() == item.home.stage:
        experts = parallel_state.get_expert_model_parallel_group()
        _broadcast(flat, item.home.expert_rank, experts)
    _broadcast(flat, item.home.stage, stages)
    return flat


def _broadcast(flat: Tensor, source: int, group: ProcessGroup) -> None:
    if group.size() > 1:
        dist.broadcast(flat, group=group, group_src=source)


def _on_all_shares(flat: Tensor, group: ProcessGroup) -> tuple[Tensor, ...]:
    """All tensor-parallel ranks' [n], in their order."""
    if group.size() == 1:
        return (flat,)
    gathered = flat.new_empty(group.size() * len(flat))
    dist.all_gather_into_tensor(gathered, flat, group=group)
    return gathered.chunk(group.size())


def _on_every_rank(value: Any, group: ProcessGroup) -> list[Any]:
    """The values of all ranks, in their order."""
    values = [value] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values
