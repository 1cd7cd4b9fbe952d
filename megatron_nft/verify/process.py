"""A verifier's worker as its caller sees it: a program of its own (`worker.py`), with a deadline.

It inherits nothing of torch, CUDA, vLLM or gloo, does not import the caller's `__main__` again, and
ends when the caller does.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from math import inf
from pathlib import Path

from megatron_nft.config import VerifyConfig
from megatron_nft.notice import SIGNALS, unheard
from megatron_nft.verify import tasks
from megatron_nft.verify.tasks import Task

STARTUP_TIMEOUT_S = 300.0  # seen: 2 s on an idle host, 60 s on an overloaded one
GRACE_S = 1.0  # by which a worker may be late in reporting a missed deadline itself
PACKAGE_ROOT = Path(__file__).parents[2]


@dataclass
class Attempt:
    """A task, and how many workers have been given it."""

    task: Task
    number: int = 0


class Worker:
    """A process that imports (not ready), waits (idle) or judges one answer (has an attempt)."""

    def __init__(self, options: VerifyConfig) -> None:
        self._timeout_s = options.timeout_s
        self.process = _spawn(options)
        self.deadline_s = time.monotonic() + STARTUP_TIMEOUT_S  # to be ready, or to give a verdict
        self.is_ready = False
        self.attempt: Attempt | None = None

    @property
    def is_idle(self) -> bool:
        return self.is_ready and self.attempt is None

    def rest(self) -> None:
        self.is_ready, self.attempt, self.deadline_s = True, None, inf

    def send(self, attempt: Attempt) -> None:
        """Raises BrokenPipeError if the process is gone; that does not count as an attempt."""
        self.process.stdin.write(tasks.encode_task(attempt.task))
        self.process.stdin.flush()
        attempt.number += 1
        self.attempt = attempt
        self.deadline_s = time.monotonic() + self._timeout_s + GRACE_S

    def receive(self) -> bytes:
        """One line, or nothing at the end of the stream.

        One read is one whole message: a worker has at most one to give, and writes it at once.
        """
        return os.read(self.process.stdout.fileno(), tasks.MAX_REPLY)

    def end(self) -> None:
        if self.process.returncode is None:  # not yet waited for: the group's id is still its own
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # what a failed write left in the buffer
            self.process.stdin.close()


def command(options: VerifyConfig) -> list[str]:
    # -P: the working directory is no place to import from
    start = [sys.executable, "-P", "-m", "megatron_nft.verify.worker"]
    max_bytes = int(options.memory_gib * 2**30)
    return [*start, str(options.timeout_s), str(max_bytes), str(options.answers_per_worker)]


def _spawn(options: VerifyConfig) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
    # numpy would reserve memory for a thread a core, against the worker's limit
    env = os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with unheard(*SIGNALS):
        return subprocess.Popen(
            command(options),
            stdin=pipe,
            stdout=pipe,
            env=env,
            process_group=0,  # a worker and its judge are ended together; Ctrl-C is the caller's
        )
