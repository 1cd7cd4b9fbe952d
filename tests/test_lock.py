"""One run at a time in a directory, whoever else is there."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_nft.lock import DirectoryLock

HOLD = """
import os, sys, time
from pathlib import Path
from megatron_nft.lock import DirectoryLock
with DirectoryLock(Path(sys.argv[1])):
    if os.fork() == 0:  # as a verifier worker that outlives its parent
        time.sleep(5)
        os._exit(0)
    print(os.getpid(), flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def held(directory: Path, seconds: float) -> Iterator[int]:
    """By a process of another's, its number."""
    command = [sys.executable, "-c", HOLD, str(directory), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        yield int(holder.stdout.readline())
        holder.kill()


def test_a_second_run_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    with (
        held(tmp_path / "run", 60) as pid,
        pytest.raises(ValueError, match=rf"run_dir: another run.*process {pid} on .*own"),
    ):
        DirectoryLock(tmp_path / "run", patience_s=0.1)


def test_the_next_run_waits_for_the_end_of_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), held(tmp_path, 1.0), DirectoryLock(tmp_path, 20):
        assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()
    assert [r.getMessage()[:11] for r in caplog.records] == ["waiting for"]  # said once


def test_a_run_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    """Though a child that it forked lives on."""
    with held(tmp_path, 60) as pid:
        os.kill(pid, signal.SIGKILL)
        beginning = time.monotonic()
        with DirectoryLock(tmp_path, patience_s=4.0):
            assert time.monotonic() - beginning < 4.0


def test_a_directory_is_free_again_afterwards(tmp_path: Path) -> None:
    for _ in range(2):
        with DirectoryLock(tmp_path, patience_s=0.0):
            pass
    with held(tmp_path, 0.0):
        pass
