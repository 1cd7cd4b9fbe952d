"""Hugging Face directories: what they hold, checked before anybody relies on it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from checkpoints_conversion.families import FAMILIES, mappings_for

# stored by some tools although the configuration determines them
DERIVED_SUFFIXES = (".rotary_emb.inv_freq",)


def read_hf_config(path: Path) -> PretrainedConfig:
    """The model directory's configuration.

    Raises:
        ValueError: no config.json there, one that is broken, an architecture that has no family
            table, or a variant of it that we do not compute.
    """
    if not (path / "config.json").is_file():
        raise ValueError(
            f"model.path: {path} has no config.json; give the directory of a Hugging Face model"
        )
    raw = _read_json(path / "config.json")
    architecture = (raw.get("architectures") or ["model without `architectures` in config.json"])[0]
    if architecture not in FAMILIES:
        raise ValueError(
            f"model.path: {path} is a {architecture}; supported: {', '.join(FAMILIES)}"
        )
    try:
        hf_config = AutoConfig.from_pretrained(path)
    except (ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"{path / 'config.json'}: transformers refuses it: {error}") from error
    if hf_config.hidden_act != "silu":
        raise ValueError(f"model.path: {path} has hidden_act={hf_config.hidden_act!r}, not 'silu'")
    if getattr(hf_config, "use_sliding_window", False):
        raise ValueError(f"model.path: {path} uses sliding-window attention, which is unsupported")
    if (rope := hf_config.rope_parameters.get("rope_type", "default")) != "default":
        raise ValueError(f"model.path: {path} has rope type {rope!r}; supported: 'default'")
    return hf_config


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: held {type(content).__name__}; it must be an object")
    return content


def expected_names(hf_config: PretrainedConfig) -> list[str]:
    """Every tensor that a checkpoint of this model holds, by its Hugging Face name."""
    return [
        name
        for mapping in mappings_for(hf_config)
        for layer in range(hf_config.num_hidden_layers if mapping.in_every_layer else 1)
        for name in mapping.names(layer)[1]
    ]


def expected_shapes(hf_config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of `expected_names`, by transformers' own model."""
    from transformers import AutoModelForCausalLM  # seconds, of no use where config.json is wrong

    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(hf_config).state_dict()
    return {name: tuple(tensors[name].shape) for name in expected_names(hf_config)}


class HFWeights:
    """The tensors of a Hugging Face directory, read on demand.

    Raises:
        ValueError: no weights there; a shard missing or damaged (it is named); names that the
            architecture does not have or that are missing; a shape that is not config.json's.
    """

    def __init__(self, path: Path, hf_config: PretrainedConfig) -> None:
        self.path = path
        self._files, shapes = _tensor_files(path)
        self._check_names(hf_config)
        for name, expected in expected_shapes(hf_config).items():
            if shapes[name] != expected:
                raise ValueError(
                    f"{path / self._files[name]}: {name} has shape {shapes[name]}, but config.json "
                    f"makes it {expected}; weights and configuration are of different models"
                )

    def __getitem__(self, name: str) -> Tensor:
        file = self.path / self._files[name]
        try:
            with safe_open(file, framework="pt") as tensors:
                return tensors.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file}: cannot read {name}: {error}") from error

    def _check_names(self, hf_config: PretrainedConfig) -> None:
        expected = set(expected_names(hf_config))
        found = {name for name in self._files if not name.endswith(DERIVED_SUFFIXES)}
        if hf_config.tie_word_embeddings:
            found.discard("lm_head.weight")  # a copy of the embedding in some checkpoints
        if missing := sorted(expected - found):
            raise ValueError(f"{self.path}: missing weights: {_some(missing)}")
        if unknown := sorted(found - expected):
            raise ValueError(f"{self.path}: weights that the model does not have: {_some(unknown)}")


def check_weights(path: Path, hf_config: PretrainedConfig) -> None:
    """Read every shard's header, so that a damaged checkpoint is found before a run starts.

    Raises:
        ValueError: see HFWeights.
    """
    HFWeights(path, hf_config)


def _tensor_files(path: Path) -> tuple[Mapping[str, str], Mapping[str, tuple[int, ...]]]:
    """Which file holds each tensor, and each tensor's shape; every file's header is read."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        by_name = _read_json(index).get("weight_map")
        if not isinstance(by_name, dict):
            raise ValueError(f"{index}: has no weight_map; download it again")
    elif (path / "model.safetensors").is_file():
        shapes = _shapes_in(path / "model.safetensors")
        return dict.fromkeys(shapes, "model.safetensors"), shapes
    else:
        raise ValueError(
            f"model.path: {path} holds neither model.safetensors nor model.safetensors.index.json"
        )
    shapes = {}
    for file in sorted(set(by_name.values())):
        present = _shapes_in(path / file)
        promised = sorted(name for name in by_name if by_name[name] == file)
        if absent := [name for name in promised if name not in present]:
            raise ValueError(f"{path / file}: the index promises {_some(absent)}, not found in it")
        shapes |= {name: present[name] for name in promised}
    return by_name, shapes


def _shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    if not file.is_file():
        raise ValueError(f"{file}: missing, though the index names it; download it again")
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged or truncated ({error}); download it again") from error


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
