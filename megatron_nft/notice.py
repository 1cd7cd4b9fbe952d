"""A scheduler's notice that the time is up: SIGTERM or SIGUSR1, to the training processes.

The run then saves and leaves with a code that says "start me again". What takes its time and has
nothing to save, sampling, is abandoned at once; what would be lost, a rollout's updates and its
evaluation, is finished first.
"""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REQUEUE = 85  # exit code of a run that is to be started again


class Interrupted(Exception):  # noqa: N818 - no error: somebody asked for it
    """Sampling was abandoned, on this rank or another."""


class Notice:
    """Whether one of the signals has come; for the main thread to make."""

    def __init__(self) -> None:
        self.has_come = False
        for number in SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        self.has_come = True
