"""Hugging Face directories: what they hold, checked before anybody relies on it."""

import json
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from checkpoints_conversion.families import FAMILIES, family_of, mappings_for, sizes_of
from checkpoints_conversion.safetensors_file import Place, read_places
from checkpoints_conversion.source import File, Info

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# stored by some tools although the configuration determines them
DERIVED_SUFFIXES = (".rotary_emb.inv_freq",)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IO_BYTES = 8 << 20
ROPE_TYPES = ("default", "linear", "llama3")  # frequencies alone; others scale attention too


def read_hf_config(path: Path, *, allows_quantized: bool = False) -> PretrainedConfig:
    """The model directory's configuration.

    Args:
        allows_quantized: also of weights that cannot be read, only looked at.

    Raises:
        ValueError: no config.json there, one that is broken, an architecture that has no family
            table, or a variant of it that we do not compute.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json; give the directory of a Hugging Face model")
    raw = read_json(path / "config.json")
    named = raw.get("architectures") or ["model without `architectures` in config.json"]
    architecture = named[0] if isinstance(named, list) else named
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise ValueError(f"{path} is a {architecture}; supported: {', '.join(FAMILIES)}")
    try:
        hf_config = AutoConfig.from_pretrained(path)
    except (ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"{path / 'config.json'}: transformers refuses it: {error}") from error
    if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(hf_config.model_type) != architecture:
        raise ValueError(
            f"{path / 'config.json'}: model_type {hf_config.model_type!r} is no {architecture}"
        )
    if why := _refusal(hf_config) or (None if allows_quantized else _quantization(hf_config)):
        raise ValueError(f"{path} has {why}, which is unsupported")
    return hf_config


def _refusal(hf_config: PretrainedConfig) -> str | None:
    """What in a configuration of a known family cannot be computed."""
    if hf_config.hidden_act != "silu":
        return f"hidden_act={hf_config.hidden_act!r} (it may be 'silu')"
    if (rope := hf_config.rope_parameters.get("rope_type", "default")) not in ROPE_TYPES:
        return f"rope type {rope!r} (it may be {', '.join(ROPE_TYPES)})"
    if hf_config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return "a rope of a part of the head (partial_rotary_factor)"
    for size in ("hidden_size", "num_attention_heads", "num_key_value_heads"):
        if getattr(hf_config, size) < 1:
            return f"{size}={getattr(hf_config, size)}"
    return family_of(hf_config).refusal(hf_config)


def _quantization(hf_config: PretrainedConfig) -> str | None:
    """How the weights are quantized; None where they are not."""
    if (quantization := getattr(hf_config, "quantization_config", None)) is None:
        return None
    method = dict(quantization).get("quant_method", quantization)
    return f"weights quantized with {method} (take the original in bfloat16)"


def read_json(file: Path) -> dict[str, Any]:
    """A file that holds a JSON object; ValueError where it does not."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: held {type(content).__name__}; it must be an object")
    return content


def expected_shapes(hf_config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this model holds, by its Hugging Face name."""
    sizes = sizes_of(hf_config)
    return {
        name: shape
        for mapping in mappings_for(hf_config)
        for _, hf_names in mapping.names(sizes)
        for name, shape in zip(hf_names, mapping.hf_shapes(sizes), strict=True)
    }


class HFWeights:
    """The tensors of a Hugging Face directory, read on demand: a `Source`.

    Raises:
        ValueError: no weights there; a shard missing or damaged (it is named); names that the
            architecture does not have or that are missing; a shape that is not config.json's.
    """

    def __init__(self, path: Path, hf_config: PretrainedConfig) -> None:
        self.path = path
        self._files, self._places = _find_tensors(path)
        self.infos = {name: place.info for name, place in self._places.items()}
        expected = expected_shapes(hf_config)
        self._check_dtypes()
        self._drop_copies(hf_config)
        check_names(str(path), self.infos, expected)
        for name, shape in expected.items():
            if (found := self.infos[name].shape) != shape:
                raise ValueError(
                    f"{path / self._files[name]}: {name} has shape {found}, but config.json "
                    f"makes it {shape}; weights and configuration are of different models"
                )

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out` with the tensor's rows from `start` on."""
        place = self._places[name]
        self._open[self._files[name]].read(place.offset + start * place.info.row_bytes, out)

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor, mapped: of a shard that is cut out of it, only that is read."""
        file = self.path / self._files[name]
        try:
            with safe_open(file, framework="pt") as tensors:
                return tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: cannot read {name}: {error}") from error

    @cached_property
    def _open(self) -> dict[str, File]:
        return {name: File(self.path / name) for name in set(self._files.values())}

    def _drop_copies(self, hf_config: PretrainedConfig) -> None:
        """Forget what a checkpoint may hold although other tensors determine it."""
        copies = [name for name in self.infos if name.endswith(DERIVED_SUFFIXES)]
        if hf_config.tie_word_embeddings and HEAD in self.infos:
            if not self._equal(HEAD, EMBEDDING):
                raise ValueError(
                    f"{self.path}: config.json ties the head to the embedding, but {HEAD} is "
                    "another one; set tie_word_embeddings to false there"
                )
            copies.append(HEAD)
        for name in copies:
            del self.infos[name]

    def _equal(self, a: str, b: str) -> bool:
        """Whether two tensors are the same, looked at a few rows at a time."""
        info = self.infos[a]
        if self.infos.get(b) != info:
            return False
        height = max(1, IO_BYTES // info.row_bytes)
        for start in range(0, info.shape[0], height):
            num_rows = min(height, info.shape[0] - start)
            rows = [torch.empty(num_rows, *info.row_shape, dtype=info.dtype) for _ in range(2)]
            self.read(a, start, rows[0])
            self.read(b, start, rows[1])
            if not rows[0].equal(rows[1]):
                return False
        return True

    def _check_dtypes(self) -> None:
        for name, info in self.infos.items():
            if info.dtype.itemsize < 2:
                raise ValueError(
                    f"{self.path / self._files[name]}: {name} is FP8; take the original in bfloat16"
                )


def check_names(where: str, found: Collection[str], expected: Collection[str]) -> None:
    """Raise ValueError with the names that one side has and the other has not."""
    if missing := sorted(set(expected) - set(found)):
        raise ValueError(f"{where}: missing weights: {some(missing)}")
    if unknown := sorted(set(found) - set(expected)):
        raise ValueError(f"{where}: weights that the model does not have: {some(unknown)}")


def check_weights(path: Path, hf_config: PretrainedConfig) -> None:
    """Read every shard's header, so that a damaged checkpoint is found before a run starts.

    Raises:
        ValueError: see HFWeights.
    """
    HFWeights(path, hf_config)


def stored_infos(path: Path) -> dict[str, Info]:
    """Every tensor in a directory's shards, of whatever model."""
    _, places = _find_tensors(path)
    return {name: place.info for name, place in places.items()}


def _find_tensors(path: Path) -> tuple[dict[str, str], dict[str, Place]]:
    """Which file holds each tensor, and where; every file's header is read."""
    if (path / INDEX).is_file():
        by_name = read_json(path / INDEX).get("weight_map")
        if not isinstance(by_name, dict) or not all(isinstance(f, str) for f in by_name.values()):
            raise ValueError(f"{path / INDEX}: has no weight_map; download it again")
        if (path / SINGLE).is_file() and SINGLE not in by_name.values():
            raise ValueError(
                f"{path} holds both {SINGLE} and {INDEX}, and programs differ in which they take; "
                "remove one"
            )
    elif (path / SINGLE).is_file():
        places = read_places(path / SINGLE)
        return dict.fromkeys(places, SINGLE), places
    else:
        raise ValueError(f"{path} holds neither {SINGLE} nor {INDEX}")
    found = {}
    for file in sorted(set(by_name.values())):
        if not (path / file).is_file():
            raise ValueError(f"{path / file}: missing, but in the index; download it again")
        places = read_places(path / file)
        promised = {name for name in by_name if by_name[name] == file}
        if absent := sorted(promised - places.keys()):
            raise ValueError(f"{path / file}: the index promises {some(absent)}, not found in it")
        found |= {name: place for name, place in places.items() if name in promised}
    return by_name, found


def some(names: list[str], limit: int = 5) -> str:
    """The first few of many names."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
