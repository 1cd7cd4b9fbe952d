"""A live, sharded model as a stream of whole tensors under their Hugging Face names."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PretrainedConfig

from checkpoints_conversion.families import mappings_for, sizes_of
from checkpoints_conversion.live import named_parameters, tensor_group
from checkpoints_conversion.mapping import Mapping


@dataclass(frozen=True)
class Home:
    """Where a parameter lives: the ranks that hold its shards, and these shards' shape."""

    stage: int  # pipeline rank
    expert_rank: int  # expert-parallel; all of them hold what is no expert
    shape: torch.Size


@torch.no_grad()
def stream(chunks: Sequence[GPTModel], hf_config: PretrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in the order of the family's table, on every rank.

    Collective: all ranks of the tensor-, pipeline- and expert-parallel groups iterate together, to
    the end. One parameter at a time is gathered, so that the extra memory is bounded by the
    largest.
    """
    sizes = sizes_of(hf_config)
    parameters = named_parameters(chunks)
    homes = _homes(parameters)
    like = next(iter(parameters.values()))  # all have one dtype and one device
    for mapping in mappings_for(hf_config):
        for name, hf_names in mapping.names(sizes):
            home = homes[name]
            mine = parameters.get(name)
            shard = like.new_empty(home.shape) if mine is None else mine.detach()
            shards = _gather(_from_home(shard, home, mapping), tensor_group(mapping))
            yield from zip(hf_names, mapping.join(shards, sizes), strict=True)


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


def _from_home(shard: Tensor, home: Home, mapping: Mapping) -> Tensor:
    """The shard of the ranks that hold it, on all: over the stage that it is in, then to others."""
    stages = parallel_state.get_pipeline_model_parallel_group()
    if mapping.is_expert and stages.rank() == home.stage:
        experts = parallel_state.get_expert_model_parallel_group()
        shard = _broadcast(shard, home.expert_rank, experts)
    return _broadcast(shard, home.stage, stages)


def _broadcast(shard: Tensor, source: int, group: ProcessGroup) -> Tensor:
    if group.size() > 1:
        shard = shard.contiguous()
        dist.broadcast(shard, group=group, group_src=source)
    return shard


def _gather(shard: Tensor, group: ProcessGroup) -> list[Tensor]:
    if group.size() == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return shards


def _on_every_rank(value: Any, group: ProcessGroup) -> list[Any]:
    """The values of all ranks, in their order."""
    values = [value] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values
