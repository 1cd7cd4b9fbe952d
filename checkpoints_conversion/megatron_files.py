"""Megatron-Core's distributed checkpoints (torch_dist), read without Megatron or a process group.

`.metadata` says which part of which tensor lies where (torch.distributed.checkpoint); each part is
what torch.save made of it. torch.load onto the meta device tells where a part's numbers begin, so
that any rows of it can be read (https://docs.pytorch.org/docs/stable/notes/serialization.html).
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from transformers import PretrainedConfig

from checkpoints_conversion.families import mappings_for, sizes_of
from checkpoints_conversion.hf_files import check_names, some
from checkpoints_conversion.mapping import Vocabulary
from checkpoints_conversion.megatron_names import Stack, parameter_keys, stacks
from checkpoints_conversion.source import File, Info

COMPLETE = "metadata.json"  # Megatron writes it last
METADATA = ".metadata"
MAX_PADDING = 128  # rows of the vocabulary a tensor-parallel rank; Megatron-LM's own padding


@dataclass
class Part:
    """A rectangle of one parameter in a file: rows `top` to `bottom`, columns `left` to `right`."""

    top: int
    bottom: int
    left: int
    right: int
    storage: _StorageInfo
    offset: int | None = None  # of its first number in the file; found when first read


class MegatronFiles:
    """A model's parameters in a checkpoint, by the names of its family's table: a `Source`.

    Optimizer states and the like beside them are left alone.

    Raises:
        ValueError: the checkpoint is incomplete or damaged, or it is another model's.
    """

    def __init__(self, path: Path, hf_config: PretrainedConfig) -> None:
        self.path = path
        self.metadata = read_metadata(path)
        self.infos: dict[str, Info] = {}
        self._stacks: dict[str, Stack] = {}
        self._find(hf_config)
        self._check_files()

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out` with the parameter's rows from `start` on."""
        stop, width = start + len(out), prod(self.infos[name].row_shape)
        rows = out.view(len(out), width)
        for part in self._parts[self._stacks[name].key, self._stacks[name].index]:
            top, bottom = max(start, part.top), min(stop, part.bottom)
            if top >= bottom:
                continue
            columns = part.right - part.left
            target = rows[top - start : bottom - start, part.left : part.right]
            wanted = target if columns == width else torch.empty_like(target).contiguous()
            place = self._offset(part, out.dtype)
            place += (top - part.top) * columns * out.dtype.itemsize
            self._open[part.storage.relative_path].read(place, wanted)
            if wanted is not target:
                target.copy_(wanted)

    def check(self) -> None:
        """Look whether every part of every parameter is there, as `read` does when it begins.

        Raises:
            ValueError: one is not.
        """
        _ = self._parts

    def _find(self, hf_config: PretrainedConfig) -> None:
        """Find every parameter of the model, and nothing else that could be one."""
        sizes, keys = sizes_of(hf_config), self.metadata.state_dict_metadata
        expected = {}
        for mapping in mappings_for(hf_config):
            for name, _ in mapping.names(sizes):
                places = [stack for stack in stacks(name, sizes) if stack.key in keys]
                expected[name] = places or stacks(name, sizes)[:1]
                if not places:
                    continue
                shape = mapping.megatron_shape(sizes)
                found = self._check_shape(places[0], shape, isinstance(mapping, Vocabulary))
                self.infos[name] = Info(shape, found.properties.dtype)
                self._stacks[name] = places[0]
        wanted = {stack.key for places in expected.values() for stack in places}
        check_names(str(self.path), parameter_keys(keys), wanted)

    def _check_shape(
        self, stack: Stack, shape: tuple[int, ...], is_vocabulary: bool
    ) -> TensorStorageMetadata:
        found = self.metadata.state_dict_metadata[stack.key]
        expected = (*stack.counts, *shape)
        num_padding = found.size[0] - shape[0]
        if is_vocabulary and 0 < num_padding < MAX_PADDING * len(found.chunks):
            expected = (found.size[0], *expected[1:])
        if tuple(found.size) != expected:
            raise ValueError(
                f"{self.path}: {stack.key} has shape {tuple(found.size)}, but the model's "
                f"configuration makes it {expected}; checkpoint and configuration are of "
                "different models"
            )
        return found

    def _check_files(self) -> None:
        """Every file that the parameters lie in is there and as long as it must be."""
        keys, ends = {stack.key for stack in self._stacks.values()}, defaultdict(int)
        for index, storage in self.metadata.storage_data.items():
            if index.fqn in keys:
                end = storage.offset + storage.length
                ends[storage.relative_path] = max(ends[storage.relative_path], end)
        for name, end in ends.items():
            file = self.path / name
            if not file.is_file():
                raise ValueError(f"{file}: missing; the checkpoint is damaged, take another")
            if (size := file.stat().st_size) < end:
                raise ValueError(
                    f"{file}: truncated ({size} bytes of at least {end}); the checkpoint is "
                    "damaged, take another"
                )

    @cached_property
    def _parts(self) -> Mapping[tuple[str, tuple[int, ...]], list[Part]]:
        """Each parameter's parts, from top to bottom, by key and index."""
        parts = defaultdict(list)
        storage = {(i.fqn, tuple(i.offset or ())): s for i, s in self.metadata.storage_data.items()}
        for key, num_leading in {s.key: len(s.index) for s in self._stacks.values()}.items():
            for chunk in self.metadata.state_dict_metadata[key].chunks:
                offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
                where = storage.get((key, offsets))
                if where is None or prod(sizes[:num_leading]) != 1 or len(sizes) > num_leading + 2:
                    raise ValueError(f"{self.path}: {key} lies in parts that cannot be read")
                (top, left, *_), (height, width, *_) = (
                    (*offsets[num_leading:], 0),
                    (*sizes[num_leading:], 1),
                )
                part = Part(top, top + height, left, left + width, where)
                parts[key, offsets[:num_leading]].append(part)
        self._check_cover(parts)
        return parts

    def _check_cover(self, parts: Mapping[tuple[str, tuple[int, ...]], list[Part]]) -> None:
        for name, stack in self._stacks.items():
            found = sum(
                (part.bottom - part.top) * (part.right - part.left)
                for part in parts[stack.key, stack.index]
            )
            size = self.metadata.state_dict_metadata[stack.key].size[len(stack.index) :]
            if found != prod(size):
                raise ValueError(f"{self.path}: {name} is not whole ({found} of {prod(size)})")

    def _offset(self, part: Part, dtype: torch.dtype) -> int:
        """Where the part's first number lies in its file."""
        if part.offset is None:
            part.offset = part.storage.offset + self._offset_in_archive(part, dtype)
        return part.offset

    def _offset_in_archive(self, part: Part, dtype: torch.dtype) -> int:
        file, where = self.path / part.storage.relative_path, part.storage
        num_numbers = (part.bottom - part.top) * (part.right - part.left)
        reader = FileSystemReader(self.path)
        try:
            with file.open("rb") as stream:
                archive = reader._slice_file(stream, where)
                tensor = torch.load(archive, map_location="meta", weights_only=True)
            start = tensor.untyped_storage()._checkpoint_offset
            start += tensor.storage_offset() * dtype.itemsize
            is_right = tensor.is_contiguous() and tensor.dtype == dtype
            is_right = is_right and tensor.numel() == num_numbers
        except Exception as error:  # a damaged archive can raise anything
            raise ValueError(f"{file}: damaged at byte {where.offset} ({error})") from error
        if not is_right or start + num_numbers * dtype.itemsize > where.length:
            raise ValueError(f"{file}: damaged at byte {where.offset} (not the part promised)")
        return start

    @cached_property
    def _open(self) -> Mapping[str, File]:
        """The files that parameters lie in, and not the optimizer's: those may be very many."""
        names = {part.storage.relative_path for parts in self._parts.values() for part in parts}
        return {name: File(self.path / name) for name in names}


def check_complete(path: Path) -> None:
    """Refuse a directory without a checkpoint, or with one whose writing was interrupted.

    Raises:
        ValueError: it is so.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is no directory; give a Megatron checkpoint's")
    if not (path / METADATA).is_file():
        inside = sorted(found.parent.name for found in path.glob("*/" + METADATA))
        hint = f"; there are checkpoints in it: {some(inside)}" if inside else ""
        raise ValueError(f"{path} holds no complete Megatron checkpoint (no {METADATA}){hint}")
    if not (path / COMPLETE).is_file():
        raise ValueError(f"{path} holds an incomplete checkpoint (no {COMPLETE}): saving it ended")


def read_metadata(path: Path) -> Metadata:
    """What a checkpoint holds.

    Raises:
        ValueError: no complete checkpoint there, or it is damaged.
    """
    check_complete(path)
    try:
        metadata: Any = FileSystemReader(path).read_metadata()
        _look_at_all(metadata)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path / METADATA}: damaged ({error}); take another one") from error
    return metadata


def _look_at_all(metadata: Metadata) -> None:
    """Raise, whatever it may be, unless all that is read of it later is there."""
    for key, tensor in metadata.state_dict_metadata.items():
        key.encode()
        if isinstance(tensor, TensorStorageMetadata):
            len(tensor.size), tensor.properties.dtype.itemsize
            for chunk in tensor.chunks:
                sum(chunk.sizes), sum(chunk.offsets)
    for index, where in metadata.storage_data.items():
        index.fqn.encode(), sum(index.offset or ()), where.offset + where.length
        Path(where.relative_path)
