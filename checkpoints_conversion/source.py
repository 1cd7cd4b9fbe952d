"""Tensors in files, read and written a few rows at a time, so that a model's size does not matter.

Files are read with `pread`, not mapped: all of a file is wanted, pages of a mapped one count as
this process's memory, and the kernel fetches them one small fault after the other. (A live model's
rank, which wants a part of each tensor, maps them: HFWeights.__getitem__.)
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

MAX_IO_BYTES = 1 << 30  # Linux reads and writes at most 2 GiB at once


@dataclass(frozen=True)
class Info:
    """What a tensor is, without its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one of its rows, slices along the first dimension."""
        return self.shape[1:]

    @property
    def row_bytes(self) -> int:
        return prod(self.row_shape) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.row_bytes


class Source(Protocol):
    """Named tensors that can be read by rows; safe to use from several threads."""

    @property
    def infos(self) -> Mapping[str, Info]:
        """Every tensor, in the order in which they are best read."""

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out`, contiguous and of the tensor's dtype, with its rows from `start` on."""


class File:
    """A file open for reading or writing at any place, by any thread."""

    def __init__(self, path: Path, num_bytes: int | None = None) -> None:
        """Open an existing file, or make a new one of `num_bytes`."""
        self.path = path
        self._file = path.open("rb" if num_bytes is None else "xb", buffering=0)
        if num_bytes is not None:
            self._file.truncate(num_bytes)

    def read(self, offset: int, out: Tensor) -> None:
        """Fill `out`, contiguous.

        Raises:
            ValueError: the file ends before, or the device cannot read it.
        """
        memory = _bytes_of(out)
        while memory:
            try:
                num_read = os.preadv(self._file.fileno(), [memory[:MAX_IO_BYTES]], offset)
            except OSError as error:
                raise ValueError(f"{self.path}: cannot be read: {error.strerror}") from error
            if num_read == 0:
                raise ValueError(f"{self.path}: ends at byte {offset}; download or save it again")
            memory, offset = memory[num_read:], offset + num_read

    def write(self, offset: int, data: Tensor | bytes) -> None:
        """Write all of it.

        Raises:
            ValueError: no space left, or the device cannot write it.
        """
        memory = memoryview(data) if isinstance(data, bytes) else _bytes_of(data)
        while memory:
            try:
                num_written = os.pwrite(self._file.fileno(), memory[:MAX_IO_BYTES], offset)
            except OSError as error:
                raise ValueError(f"{self.path}: cannot be written: {error.strerror}") from error
            memory, offset = memory[num_written:], offset + num_written

    def close(self) -> None:
        self._file.close()


def _bytes_of(tensor: Tensor) -> memoryview:
    assert tensor.is_contiguous()
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())
