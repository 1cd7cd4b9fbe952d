"""From a Hugging Face directory into a live Megatron-Core model, tensor by tensor."""

from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from transformers import PretrainedConfig

from checkpoints_conversion.families import mappings_for, sizes_of
from checkpoints_conversion.hf_files import HFWeights
from checkpoints_conversion.live import named_parameters, tensor_group
from checkpoints_conversion.mapping import Mapping


def load(chunks: Sequence[GPTModel], path: Path, hf_config: PretrainedConfig) -> None:
    """Fill this rank's shards of the model; only the tensors that they are made of are read.

    Raises:
        ValueError: see HFWeights.
    """
    weights, sizes = HFWeights(path, hf_config), sizes_of(hf_config)
    sources = _sources(hf_config)
    for name, parameter in named_parameters(chunks).items():
        mapping, hf_names = sources[name]
        group = tensor_group(mapping)
        tensors = [weights[hf_name] for hf_name in hf_names]
        shard = mapping.split(tensors, group.rank(), group.size(), sizes)
        assert parameter.shape == shard.shape, f"{name}: {parameter.shape}, {shard.shape}"
        with torch.no_grad():
            parameter.copy_(shard)


def _sources(hf_config: PretrainedConfig) -> dict[str, tuple[Mapping, tuple[str, ...]]]:
    """What each Megatron parameter is made of: its mapping and the names in the directory."""
    sizes = sizes_of(hf_config)
    sources = {
        name: (mapping, hf_names)
        for mapping in mappings_for(hf_config)
        for name, hf_names in mapping.names(sizes)
    }
    if hf_config.tie_word_embeddings:  # the last pipeline stage has a copy for its head
        sources["output_layer.weight"] = sources["embedding.word_embeddings.weight"]
    return sources
