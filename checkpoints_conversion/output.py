"""New directories that appear under their name only when they are complete."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"  # in the new directory; NFS has locks of files alone
SPARE_BYTES = 64 << 20  # configuration, tokenizer, metadata


def check_free(out: Path, num_bytes: int) -> None:
    """Raise ValueError where `out` exists or its disk has no room for so many bytes."""
    if out.exists():
        raise ValueError(f"--out: {out} exists; give a new directory, or remove it first")
    parent = next(parent for parent in out.absolute().parents if parent.is_dir())
    needed, free = num_bytes + SPARE_BYTES, shutil.disk_usage(parent).free
    if free < needed:
        raise ValueError(
            f"--out: {parent} has {free / 1e9:.1f} GB free, and {out.name} needs "
            f"{needed / 1e9:.1f} GB; make room or give another disk's directory"
        )


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` at the end, replacing what is there.

    What an interrupted process left of it is removed first, and an exception removes it again;
    until the end, nothing of an earlier `out` is touched.

    Raises:
        ValueError: it cannot be made or written, or another process is writing it.
    """
    partial = out.with_name(out.name + ".partial")
    lock = _make_and_lock(partial)
    try:
        yield partial
        _replace(out, partial)
        (out / LOCK).unlink()
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(f"{error.filename or partial}: {error.strerror}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _replace(out: Path, new: Path) -> None:
    """Give `new` the name `out`; what had it before is removed after that."""
    if not out.exists():
        new.rename(out)
        return
    old = out.with_name(out.name + ".replaced")
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _make_and_lock(partial: Path) -> int:
    """A new, empty directory that no other process makes: its lock, a file descriptor."""
    path = partial / LOCK
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise ValueError(f"{partial}: cannot be made: {error.strerror}") from error
    if not _holds(lock, path):
        os.close(lock)
        raise ValueError(f"{partial}: another process is writing it; wait for its end")
    for leftover in partial.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        elif leftover != path:
            leftover.unlink()
    return lock


def _holds(lock: int, path: Path) -> bool:
    """Whether the lock is ours, and still that of the directory: its owner may just have ended."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return path.exists() and os.path.samestat(os.fstat(lock), path.stat())
