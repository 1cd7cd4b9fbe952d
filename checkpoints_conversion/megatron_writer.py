"""Megatron-Core's distributed checkpoints (torch_dist), written by rows.

What Megatron itself would write from a model, without the model: torch.save makes each part's
archive with a hole for the numbers (torch.serialization.skip_data), and these fill it. A part is
at most PART_BYTES of one parameter, so that a reader with few of its rows need not read it all.
"""

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from checkpoints_conversion.mapping import Sizes
from checkpoints_conversion.megatron_files import COMPLETE
from checkpoints_conversion.megatron_names import Stack, extra_states, written_stacks
from checkpoints_conversion.source import File, Info

PART_BYTES = 64 << 20
FILE_BYTES = 4 << 30
COMMON_STATE = "common_state/shard_0_1"  # what is no tensor; Megatron loads it first


@dataclass(frozen=True)
class Part:
    """Rows `top` to `bottom` of a parameter, and where their numbers lie."""

    top: int
    bottom: int
    file: int
    offset: int


class MegatronWriter:
    """A new checkpoint of these parameters, whose numbers are then written in any order.

    Args:
        path: an existing, empty directory.
        infos: the parameters by the names of the family's table.
    """

    def __init__(self, path: Path, infos: Mapping[str, Info], sizes: Sizes) -> None:
        self.path = path
        self._pieces: list[list[tuple[int, bytes]]] = [[]]  # by file: what lies between the holes
        self._ends = [0]
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._results: list[WriteResult] = []
        self._parts = {
            name: [
                part for stack in written_stacks(name, sizes) for part in self._plan(stack, info)
            ]
            for name, info in infos.items()
        }
        self._objects = [*extra_states(sizes)]
        for key in self._objects:
            self._append(MetadataIndex(key), _archive([None]))
        self._append(MetadataIndex(COMMON_STATE), _archive([{}]))
        self._files = [
            File(path / _file_name(number), end) for number, end in enumerate(self._ends)
        ]
        for file, pieces in zip(self._files, self._pieces, strict=True):
            for offset, data in pieces:
                file.write(offset, data)

    def write(self, name: str, start: int, rows: Tensor) -> None:
        """Write a parameter's rows from `start` on; safe from several threads."""
        stop = start + len(rows)
        for part in self._parts[name]:
            top, bottom = max(start, part.top), min(stop, part.bottom)
            if top < bottom:
                wanted = rows[top - start : bottom - start]
                row_bytes = wanted.nbytes // len(wanted)
                self._files[part.file].write(part.offset + (top - part.top) * row_bytes, wanted)

    def finish(self) -> None:
        """Write what makes it a checkpoint; all rows have been written."""
        for file in self._files:
            file.close()
        objects = {key: BytesStorageMetadata() for key in (*self._objects, COMMON_STATE)}
        metadata = Metadata(state_dict_metadata={**self._tensors, **objects})
        FileSystemWriter(self.path).finish(metadata, [self._results])
        content = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (self.path / COMPLETE).write_text(json.dumps(content))

    def _plan(self, stack: Stack, info: Info) -> Iterable[Part]:
        """Give a parameter's parts their places."""
        if stack.key not in self._tensors:
            self._tensors[stack.key] = TensorStorageMetadata(
                TensorProperties(dtype=info.dtype), torch.Size((*stack.counts, *info.shape)), []
            )
        if (first := self._tensors[stack.key].properties.dtype) != info.dtype:
            raise ValueError(
                f"{stack.key}: {first} and {info.dtype}, but Megatron has all layers in one tensor"
            )
        height = max(1, PART_BYTES // info.row_bytes)
        for top in range(0, info.shape[0], height):
            bottom = min(top + height, info.shape[0])
            ones = (1,) * len(stack.index)
            sizes = torch.Size((*ones, bottom - top, *info.row_shape))
            offsets = torch.Size((*stack.index, top, *(0 for _ in info.row_shape)))
            self._tensors[stack.key].chunks.append(ChunkStorageMetadata(offsets, sizes))
            pieces = _archive(torch.empty(sizes, dtype=info.dtype))
            [(_, before), *_] = pieces
            first = self._append(MetadataIndex(stack.key, offsets), pieces)
            yield Part(top, bottom, len(self._ends) - 1, first + len(before))

    def _append(self, index: MetadataIndex, pieces: list[tuple[int, bytes]]) -> int:
        """Put an archive at the end of the last file; where it begins there."""
        length = pieces[-1][0] + len(pieces[-1][1])
        if self._ends[-1] and self._ends[-1] + length > FILE_BYTES:
            self._ends.append(0)
            self._pieces.append([])
        start = self._ends[-1]
        self._pieces[-1] += [(start + offset, data) for offset, data in pieces]
        self._ends[-1] += length
        where = _StorageInfo(_file_name(len(self._ends) - 1), start, length)
        self._results.append(WriteResult(index, length, where))
        return start


class _Recorder(io.RawIOBase):
    """A file that remembers what was written where, and has holes where was skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[tuple[int, bytearray]] = []
        self._position = 0

    def write(self, data: Any) -> int:
        if not self.pieces or self._position != self.pieces[-1][0] + len(self.pieces[-1][1]):
            self.pieces.append((self._position, bytearray()))
        self.pieces[-1][1].extend(data)
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_CUR
        self._position += offset
        return self._position


def _archive(value: Any) -> list[tuple[int, bytes]]:
    """What torch.save makes of a value, but for a tensor's numbers: offsets and bytes."""
    recorder = _Recorder()
    with torch.serialization.skip_data():
        torch.save(value, recorder)
    return [(offset, bytes(data)) for offset, data in recorder.pieces]


def _file_name(number: int) -> str:
    return f"__0_{number}.distcp"
