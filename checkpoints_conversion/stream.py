"""A live, sharded model as a stream of whole tensors under their Hugging Face names."""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from transformers import PretrainedConfig

from checkpoints_conversion.families import mappings_for, sizes_of
from checkpoints_conversion.live import named_parameters

Owners = Mapping[str, tuple[int, torch.Size]]  # a parameter's pipeline rank, its shards' shape


@torch.no_grad()
def stream(chunks: Sequence[GPTModel], hf_config: PretrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in the order of the family's table, on every rank.

    Collective: all ranks of a tensor- and pipeline-parallel group iterate together, to the end. One
    parameter at a time is gathered, so that the extra memory is bounded by the largest.
    """
    sizes = sizes_of(hf_config)
    parameters = named_parameters(chunks)
    owners = _owners(parameters)
    like = next(iter(parameters.values()))  # all have one dtype and one device
    for mapping in mappings_for(hf_config):
        for layer in range(sizes.num_layers if mapping.in_every_layer else 1):
            name, hf_names = mapping.names(layer)
            stage, shape = owners[name]
            shard = parameters[name].detach() if name in parameters else like.new_empty(shape)
            shards = _gather(_from_stage(shard, stage))
            yield from zip(hf_names, mapping.join(shards, sizes), strict=True)


def _owners(parameters: Mapping[str, Tensor]) -> Owners:
    """Which pipeline rank holds each parameter; the same on all of them."""
    group = parallel_state.get_pipeline_model_parallel_group()
    shapes: list[dict[str, torch.Size]] = [{} for _ in range(group.size())]
    mine = {name: parameter.shape for name, parameter in parameters.items()}
    dist.all_gather_object(shapes, mine, group=group)
    return {name: (rank, shape) for rank, held in enumerate(shapes) for name, shape in held.items()}


def _from_stage(shard: Tensor, stage: int) -> Tensor:
    """The shard of a pipeline rank, on all of them."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() > 1:
        shard = shard.contiguous()
        dist.broadcast(shard, dist.get_global_rank(group, stage), group=group)
    return shard


def _gather(shard: Tensor) -> list[Tensor]:
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return shards
