"""What is in a checkpoint's directory, whole or not."""

from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from checkpoints_conversion.checkpoint import Checkpoint, is_megatron, open_checkpoint
from checkpoints_conversion.families import sizes_of
from checkpoints_conversion.hf_files import (
    expected_shapes,
    read_hf_config,
    read_json,
    some,
    stored_infos,
)
from checkpoints_conversion.megatron_names import RUN_STATE
from checkpoints_conversion.source import Info


def inspect(path: Path, hf: Path | None = None) -> dict[str, Any]:
    """Family, sizes, dtypes, layout, step, and whether all of it is there.

    Args:
        hf: configuration of a Megatron checkpoint that has none itself.

    Raises:
        ValueError: the directory is no checkpoint at all.
    """
    found: dict[str, Any] = {"path": str(path)}
    found["format"] = "Megatron torch_dist" if is_megatron(path) else "Hugging Face"
    try:
        found |= _quantized(path) or _readable(open_checkpoint(path, hf))
    except ValueError as error:
        return found | {"complete": False, "why": str(error)}
    return found | {"complete": True}


def _readable(checkpoint: Checkpoint) -> dict[str, Any]:
    found = _model(checkpoint.hf_config) | _tensors(checkpoint.tensors.infos)
    return found | (_training(checkpoint) if checkpoint.is_megatron else {})


def _quantized(path: Path) -> dict[str, Any] | None:
    """A Hugging Face directory whose weights can only be looked at; None where it is none."""
    if is_megatron(path):
        return None
    hf_config = read_hf_config(path, allows_quantized=True)
    if (quantization := getattr(hf_config, "quantization_config", None)) is None:
        return None
    infos = stored_infos(path)
    if missing := [name for name in expected_shapes(hf_config) if name not in infos]:
        raise ValueError(f"{path}: missing weights: {some(missing)}")
    shown = {k: v for k, v in quantization.items() if k != "modules_to_not_convert"}
    return _model(hf_config) | _tensors(infos) | {"quantization": shown}


def _model(hf_config: PretrainedConfig) -> dict[str, Any]:
    sizes = sizes_of(hf_config)
    found = {
        "family": hf_config.architectures[0],
        "layers": sizes.num_layers,
        "hidden": sizes.hidden,
        "attention heads": sizes.num_heads,
        "key-value heads": sizes.num_kv_heads,
        "head dim": sizes.head_dim,
        "intermediate": sizes.ffn,
        "vocabulary": sizes.vocab,
        "tied embeddings": hf_config.tie_word_embeddings,
        "rope": dict(hf_config.rope_parameters),
    }
    if sizes.num_experts:
        found |= {"experts": sizes.num_experts, "experts a token": hf_config.num_experts_per_tok}
    return found


def _tensors(infos: Mapping[str, Info]) -> dict[str, Any]:
    dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in infos.values())
    return {
        "tensors": len(infos),
        "parameters": sum(prod(info.shape) for info in infos.values()),
        "bytes": sum(info.num_bytes for info in infos.values()),
        "dtypes": dict(dtypes),
    }


def _training(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where the run stood that saved it, and in which layout."""
    marker = checkpoint.path / RUN_STATE
    if not marker.is_file():
        return {"saved by": "conversion, or another program", "parallel layout": "loads at any"}
    content = read_json(marker)
    if not {"state", "parallel"} <= content.keys():
        raise ValueError(f"{marker}: of another version of this program")
    return {"saved by": "training", **content["state"], "parallel layout": content["parallel"]}
