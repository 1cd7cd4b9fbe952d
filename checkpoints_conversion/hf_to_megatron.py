"""From a Hugging Face directory into a live Megatron-Core model, tensor by tensor."""

from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from transformers import PretrainedConfig

from checkpoints_conversion.families import mappings_for, sizes_of
from checkpoints_conversion.hf_files import HFWeights


def load(model: GPTModel, path: Path, hf_config: PretrainedConfig) -> None:
    """Fill this rank's shards of the model.

    Raises:
        ValueError: see HFWeights.
    """
    weights = HFWeights(path, hf_config)
    parameters = dict(model.named_parameters())
    for megatron_name, shard in _shards(weights, hf_config):
        parameter = parameters.pop(megatron_name)
        assert parameter.shape == shard.shape, f"{megatron_name}: {parameter.shape}, {shard.shape}"
        with torch.no_grad():
            parameter.copy_(shard)
    assert not parameters, f"the name table does not fill {sorted(parameters)}"


def _shards(weights: HFWeights, hf_config: PretrainedConfig) -> Iterator[tuple[str, Tensor]]:
    sizes = sizes_of(hf_config)
    rank = parallel_state.get_tensor_model_parallel_rank()
    num_ranks = parallel_state.get_tensor_model_parallel_world_size()
    for mapping in mappings_for(hf_config):
        for layer in range(sizes.num_layers if mapping.in_every_layer else 1):
            megatron_name, hf_names = mapping.names(layer)
            tensors = [weights[name] for name in hf_names]
            yield megatron_name, mapping.split(tensors, rank, num_ranks, sizes)
