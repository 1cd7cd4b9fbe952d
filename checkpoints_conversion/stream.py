"""A live, sharded model as a stream of whole tensors under their Hugging Face names."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from transformers import PretrainedConfig

from checkpoints_conversion.families import mappings_for, sizes_of


@torch.no_grad()
def stream(model: GPTModel, hf_config: PretrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in the order of the family's table, on every tensor-parallel rank.

    Collective: all ranks of a tensor-parallel group iterate together, to the end. One parameter
    at a time is gathered, so that the extra memory is bounded by the largest.
    """
    sizes = sizes_of(hf_config)
    parameters = dict(model.named_parameters())
    for mapping in mappings_for(hf_config):
        for layer in range(sizes.num_layers if mapping.in_every_layer else 1):
            megatron_name, hf_names = mapping.names(layer)
            shards = _gather(parameters[megatron_name].detach())
            yield from zip(hf_names, mapping.join(shards, sizes), strict=True)


def _gather(shard: Tensor) -> list[Tensor]:
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return shards
