"""Hugging Face directories: what they hold, checked before anybody relies on it."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from checkpoints_conversion.families import FAMILIES, mappings_for

# stored by some tools although the configuration determines them
DERIVED_SUFFIXES = (".rotary_emb.inv_freq",)


def read_hf_config(path: Path) -> PretrainedConfig:
    """The model directory's configuration.

    Raises:
        ValueError: no config.json there, or an architecture that has no family table.
    """
    if not (path / "config.json").is_file():
        raise ValueError(
            f"model.path: {path} has no config.json; give the directory of a Hugging Face model"
        )
    hf_config = AutoConfig.from_pretrained(path)
    architecture = (hf_config.architectures or ["none"])[0]
    if architecture not in FAMILIES:
        raise ValueError(
            f"model.path: {path} is a {architecture}; supported: {', '.join(FAMILIES)}"
        )
    if getattr(hf_config, "use_sliding_window", False):
        raise ValueError(f"model.path: {path} uses sliding-window attention, which is unsupported")
    return hf_config


def expected_names(hf_config: PretrainedConfig) -> list[str]:
    """Every tensor that a checkpoint of this model holds, by its Hugging Face name."""
    return [
        name
        for mapping in mappings_for(hf_config)
        for layer in range(hf_config.num_hidden_layers if mapping.in_every_layer else 1)
        for name in mapping.names(layer)[1]
    ]


class HFWeights:
    """The tensors of a Hugging Face directory, read on demand.

    Raises:
        ValueError: no weights there; a shard missing or damaged (it is named); names that the
            architecture does not have or that are missing.
    """

    def __init__(self, path: Path, hf_config: PretrainedConfig) -> None:
        self.path = path
        self._files = _tensor_files(path)
        self._check_names(hf_config)

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
    """Open every shard's header, so that a damaged checkpoint is found before a run starts.

    Raises:
        ValueError: see HFWeights.
    """
    HFWeights(path, hf_config)


def _tensor_files(path: Path) -> Mapping[str, str]:
    """Which file holds each tensor; every file's header is read."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        by_name: dict[str, str] = json.loads(index.read_text())["weight_map"]
    elif (path / "model.safetensors").is_file():
        by_name = dict.fromkeys(_names_in(path / "model.safetensors"), "model.safetensors")
    else:
        raise ValueError(
            f"model.path: {path} holds neither model.safetensors nor model.safetensors.index.json"
        )
    for file in sorted(set(by_name.values())):
        present = set(_names_in(path / file))
        absent = sorted(n for n, f in by_name.items() if f == file and n not in present)
        if absent:
            raise ValueError(f"{path / file}: the index promises {_some(absent)}, not found in it")
    return by_name


def _names_in(file: Path) -> list[str]:
    if not file.is_file():
        raise ValueError(f"{file}: missing, though the index names it; download it again")
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged or truncated ({error}); download it again") from error


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
