"""A run's directory of checkpoints: what lies in it, what is complete, and what is still sound.

    rollout_N           complete: it has this name only since all of it is on the disk
    rollout_N.partial   being written, or left by a process that was killed
    rollout_N.old       being removed
    rollout_N.damaged   found damaged at a resume; removed once rollout_N is written anew
    best                a link to the best one, where the recipe asks for it

The marker file, written last, holds the run's state, and the size and CRC of every other file. The
CRC guards against accidents, not against attacks. Nothing here is collective.
"""

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoints_conversion.megatron_names import RUN_STATE

NAME = re.compile(r"rollout_(\d+)")
PARTIAL, OLD, DAMAGED, BEST = ".partial", ".old", ".damaged", "best"
PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class File:
    """What a file was when it had been written."""

    bytes: int
    crc32: int


@dataclass(frozen=True)
class Marker:
    """What a marker file holds; `files` is None in those of before files were listed."""

    state: dict[str, Any]
    files: dict[str, File] | None


def path_of(directory: Path, rollout: int) -> Path:
    return directory / f"rollout_{rollout}"


def named(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def complete(directory: Path) -> list[Path]:
    """All checkpoints that were complete once, oldest first."""
    found = [(int(m[1]), path) for path in directory.glob("*") if (m := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def leftovers(directory: Path) -> list[Path]:
    """What is no checkpoint and takes room: interrupted ones, and those that were set aside."""
    return sorted(p for s in (PARTIAL, OLD, DAMAGED) for p in directory.glob(f"rollout_*{s}"))


# writing


def begin(path: Path) -> Path:
    """An empty directory for what is to become `path`."""
    partial = named(path, PARTIAL)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def check_room(directory: Path, num_bytes: int) -> None:
    """Raise the OSError of a full disk where there is no room for so many bytes."""
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        why = f"No space left on device, {num_bytes} bytes are needed"
        raise OSError(errno.ENOSPC, why, str(directory))


def describe(file: Path) -> File:
    """The file's size and CRC, once the disk has it."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    return File(file.stat().st_size, _crc32(file))


def describe_all(path: Path, known: Mapping[str, File]) -> dict[str, File]:
    """Every file below `path` by its relative name; those that are known are not read again."""
    names = [str(p.relative_to(path)) for p in sorted(path.rglob("*")) if p.is_file()]
    return {name: known.get(name) or describe(path / name) for name in names}


def write_marker(path: Path, content: Mapping[str, Any], files: Mapping[str, File]) -> None:
    """Declare `path` complete: all at once, or not at all."""
    content = {**content, "files": {name: asdict(file) for name, file in files.items()}}
    temporary = path / (RUN_STATE + PARTIAL)
    temporary.write_text(json.dumps({**content, "crc32": _crc32_of(content)}))
    sync(temporary)
    for folder in (path, *(p for p in path.rglob("*") if p.is_dir())):
        sync(folder)
    temporary.rename(path / RUN_STATE)
    sync(path)


def publish(partial: Path, path: Path) -> None:
    """Give a complete directory its name; an earlier one of that name is removed after that."""
    old = named(path, OLD)
    replaces = path.exists()
    if replaces:
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        if replaces:
            old.rename(path)
        raise
    sync(path.parent)


def finish_interrupted(directory: Path) -> None:
    """Publish what a process had declared complete before it was killed."""
    for partial in directory.glob("rollout_*" + PARTIAL):
        path = partial.with_name(partial.name.removesuffix(PARTIAL))
        if (partial / RUN_STATE).exists() and not path.exists():
            publish(partial, path)


def link_best(directory: Path, rollout: int) -> None:
    """Let `best` lead to a rollout's checkpoint, at once; to none where it is 0."""
    link, new = directory / BEST, directory / (BEST + PARTIAL)
    if not rollout:
        if link.is_symlink():
            link.unlink()
        return
    new.unlink(missing_ok=True)
    new.symlink_to(path_of(directory, rollout).name)
    new.replace(link)


def prune(directory: Path, keep: int, newest: Path, best: Path | None) -> None:
    """Remove all but the newest `keep` and the best, and what is left of interrupted saves.

    Removed is what would otherwise look like a damaged checkpoint if we were killed meanwhile.
    """
    paths = complete(directory)
    for path in paths[:-keep]:
        if path != best:
            shutil.rmtree(named(path, OLD), ignore_errors=True)
            path.rename(named(path, OLD))
    for path in leftovers(directory):
        if path.suffix != DAMAGED or path.stem == newest.name:
            shutil.rmtree(path)


def sync(path: Path) -> None:
    """Wait until the disk has a file, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise  # some file systems sync no directories
    finally:
        os.close(descriptor)


# reading


def read_marker(path: Path) -> Marker:
    """What `path`'s marker file holds.

    Raises:
        ValueError: it is missing, or is not what was written.
        OSError: it cannot be read now.
    """
    try:
        content = json.loads((path / RUN_STATE).read_bytes())
        files, crc32 = content.get("files"), content.pop("crc32", None)
        if files is not None and crc32 != _crc32_of(content):
            raise ValueError("it has other bytes than were written")
        listed = None if files is None else {name: File(**file) for name, file in files.items()}
        return Marker(content["state"], listed)
    except FileNotFoundError:
        raise ValueError(f"{RUN_STATE} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{RUN_STATE} cannot be read: {error}") from error


def trouble(path: Path, name: str, written: File) -> str | None:
    """How a file differs from what was written; None where it does not.

    Raises:
        OSError: it cannot be read now, which says nothing of what is in it.
    """
    try:
        size = (path / name).stat().st_size
        if size != written.bytes:
            return f"{name} has {size} bytes, and {written.bytes} were written"
        found = _crc32(path / name)
    except FileNotFoundError:
        return f"{name} is missing"
    return None if found == written.crc32 else f"{name} has other bytes than were written"


def set_aside(path: Path) -> None:
    """Take its name from a damaged checkpoint, and leave it as it is."""
    aside = named(path, DAMAGED)
    if aside.exists():  # found damaged earlier, and written anew
        shutil.rmtree(aside)
    path.rename(aside)


def _crc32(file: Path) -> int:
    value = 0
    with file.open("rb", buffering=0) as opened:
        while piece := opened.read(PIECE_BYTES):
            value = zlib.crc32(piece, value)
    return value


def _crc32_of(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
