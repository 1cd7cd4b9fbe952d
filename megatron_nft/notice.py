"""A scheduler's notice that the time is up: SIGTERM or SIGUSR1, to the training processes.

The run then saves and leaves with a code that says "start me again". What takes its time and has
nothing to save, sampling, is abandoned at once; what would be lost, a rollout's updates and its
evaluation, is finished first. Servers are asked by rank 0: where the notice comes to other ranks
alone, the batch that they are sampling is finished too.
"""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REQUEUE = 85  # exit code of a run that is to be started again


class Interrupted(Exception):  # noqa: N818 - no error: somebody asked for it
    """Sampling was abandoned, on this rank or another."""


class Notice:
    """Whether one of the signals has come; a context manager for the main thread."""

    def __init__(self) -> None:
        self.has_come = False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        self.has_come = True


@contextlib.contextmanager
def unheard(*numbers: signal.Signals) -> Iterator[None]:
    """What is started meanwhile never hears of these signals, unlike this thread afterwards.

    Slurm signals every process of a job step; the notice is for training processes alone.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
