"""From a Hugging Face directory into a live Megatron-Core model, tensor by tensor."""

from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from transformers import PretrainedConfig

from checkpoints_conversion.families import mappings_for, sizes_of
from checkpoints_conversion.hf_files import HFWeights
from checkpoints_conversion.live import named_parameters
from checkpoints_conversion.mapping import Mapping


def load(chunks: Sequence[GPTModel], path: Path, hf_config: PretrainedConfig) -> None:
    """Fill this rank's shards of the model; only the tensors that they are made of are read.

    Raises:
        ValueError: see HFWeights.
    """
    weights, sizes = HFWeights(path, hf_config), sizes_of(hf_config)
    rank = parallel_state.get_tensor_model_parallel_rank()
    num_ranks = parallel_state.get_tensor_model_parallel_world_size()
    sources = _sources(hf_config)
    for name, parameter in named_parameters(chunks).items():
        mapping, hf_names = sources[name]
        shard = mapping.split([weights[n] for n in hf_names], rank, num_ranks, sizes)
        assert parameter.shape == shard.shape, f"{name}: {parameter.shape}, {shard.shape}"
        with torch.no_grad():
            parameter.copy_(shard)


def _sources(hf_config: PretrainedConfig) -> dict[str, tuple[Mapping, tuple[str, ...]]]:
    """What each Megatron parameter is made of: its mapping and the names in the directory."""
    sources = {}
    for mapping in mappings_for(hf_config):
        for layer in range(hf_config.num_hidden_layers if mapping.in_every_layer else 1):
            name, hf_names = mapping.names(layer)
            sources[name] = mapping, hf_names
    if hf_config.tie_word_embeddings:  # the last pipeline stage has a copy for its head
        sources["output_layer.weight"] = sources["embedding.word_embeddings.weight"]
    return sources
