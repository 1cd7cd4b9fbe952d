"""New directories that appear under their name only when they are complete."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"  # in the new directory; NFS has locks of files alone
SPARE_BYTES = 64 << 20  # configuration, tokenizer, metadata


def check_free(out: Path, num_bytes: int) -> None:
    """Raise ValueError where `out` exists or its disk has no room for so many bytes."""
    if os.path.lexists(out):
        raise ValueError(f"--out: {out} exists; give a new directory, or remove it first")
    parent = next(parent for parent in out.absolute().parents if parent.is_dir())
    needed, free = num_bytes + SPARE_BYTES, shutil.disk_usage(parent).free
    if free < needed:
        raise ValueError(
            f"--out: {parent} has {free / 1e9:.1f} GB free, and {out.name} needs "
            f"{needed / 1e9:.1f} GB; make room or give another disk's directory"
        )


@contextmanager
def new_directory(out: Path, *, replaces: bool = False) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` at the end.

    What an interrupted process left of it is removed first, and an exception removes it again.

    Args:
        replaces: an earlier `out`, of which nothing is touched until the end; it may be a link.

    Raises:
        ValueError: it cannot be made or written, another process is writing it, or something else
            has its name.
    """
    out = out.resolve() if replaces else out
    partial = out.with_name(out.name + ".partial")
    lock = _make_and_lock(partial)
    try:
        yield partial
        if replaces:
            _replace(out, partial)
        elif os.path.lexists(out):
            raise ValueError(f"--out: {out} appeared meanwhile; it was left alone")
        else:
            partial.rename(out)
        (out / LOCK).unlink()
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(f"{error.filename or partial}: {error.strerror}") from error
    except BaseException:  # Ctrl-C too leaves nothing behind
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _replace(out: Path, new: Path) -> None:
    """Give `new` the name `out`; what had it before is removed after that."""
    if not out.exists():
        new.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=out.name + ".replaced-", dir=out.parent))
    out.rename(old)  # onto the empty directory
    try:
        new.rename(out)
    except BaseException:  # Ctrl-C too: the earlier one has its name again
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _make_and_lock(partial: Path) -> int:
    """A new, empty directory that no other process makes: its lock, a file descriptor."""
    path = partial / LOCK
    is_ours = not partial.is_symlink() and path.is_file()
    if os.path.lexists(partial) and not is_ours:
        raise ValueError(f"{partial} is in the way and was not left by a conversion; rename it")
    try:
        partial.mkdir(parents=True, exist_ok=is_ours)
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
