"""Hugging Face directories, written by rows."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_conversion.hf_files import INDEX, SINGLE
from checkpoints_conversion.safetensors_file import Place, lay_out
from checkpoints_conversion.source import File, Info

SHARD_BYTES = 5_000_000_000
CARRIED = (  # beside the weights
    "*.json",
    "*.jinja",
    "*.txt",
    "tokenizer.model*",
    "*.model",
    "*.tiktoken",
    "additional_chat_templates/*",
    "LICENSE*",
    "NOTICE*",
)


class HFWriter:
    """New shards of these tensors, with an index where they are several; rows in any order.

    Args:
        path: an existing directory without weights.
        infos: the tensors by name; shards follow this order.
    """

    def __init__(
        self, path: Path, infos: Mapping[str, Info], shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.infos = infos
        self._places: dict[str, tuple[File, Place]] = {}
        self._files = []
        shards = list(_shards(infos, shard_bytes))
        for number, names in enumerate(shards, start=1):
            file_name = SINGLE if len(shards) == 1 else _shard_name(number, len(shards))
            header, places, num_bytes = lay_out({name: infos[name] for name in names})
            file = File(path / file_name, num_bytes)
            file.write(0, header)
            self._files.append(file)
            self._places |= {name: (file, place) for name, place in places.items()}
        if len(shards) > 1:
            self._write_index(path)

    def write(self, name: str, start: int, rows: Tensor) -> None:
        """Write a tensor's rows from `start` on; safe from several threads."""
        file, place = self._places[name]
        file.write(place.offset + start * place.info.row_bytes, rows)

    def finish(self) -> None:
        """All rows have been written."""
        for file in self._files:
            file.close()

    def _write_index(self, path: Path) -> None:
        weight_map = {name: file.path.name for name, (file, _) in self._places.items()}
        total = sum(info.num_bytes for info in self.infos.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / INDEX).write_text(json.dumps(index, indent=2))


def carry_over(source: Path, out: Path) -> None:
    """Copy configuration, generation configuration, tokenizer, chat template and license."""
    for pattern in CARRIED:
        for file in source.glob(pattern):
            if file.is_file() and not file.name.endswith(".index.json"):
                copied = out / file.relative_to(source)
                copied.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copied)


def declare(file: Path, dtype: torch.dtype, **changes: Any) -> None:
    """Write the weights' dtype into config.json: transformers and vLLM convert them to it."""
    config, name = json.loads(file.read_text()), str(dtype).removeprefix("torch.")
    changes |= {"torch_dtype" if "torch_dtype" in config else "dtype": name}
    if config != config | changes:
        file.write_text(json.dumps(config | changes, indent=2) + "\n")


def _shards(infos: Mapping[str, Info], shard_bytes: int) -> Iterator[list[str]]:
    """Consecutive names of at most `shard_bytes` together."""
    names: list[str] = []
    num_bytes = 0
    for name, info in infos.items():
        if names and num_bytes + info.num_bytes > shard_bytes:
            yield names
            names, num_bytes = [], 0
        names.append(name)
        num_bytes += info.num_bytes
    yield names


def _shard_name(number: int, num_shards: int) -> str:
    return f"model-{number:05d}-of-{num_shards:05d}.safetensors"
