"""Ends a job that makes no progress, once every process of it has said where it stands.

Collectives hang for hours and in silence: a lost node, a rank that went another way, a driver. A
thread of each training process looks for progress, that of any rank: who waits for another's long
answers is not stuck. Where it finds none the process reports and ends with EXIT_CODE, so that
torchrun ends the others and the job can be started again.

The thread needs Python's lock, and the file system. As a second line, a timer of faulthandler's in
C, which the thread winds up again and again, writes the stacks and ends the process (exit code 1)
where the thread itself is stuck. A process has one such timer.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

FILE_PHASES, FILE_PATIENCE = ("model", "resume", "checkpoint", "export"), 4
EXIT_CODE = 86  # of a process that reported a stall
SHARED_FILE = "watchdog.txt"  # a line a report, of all ranks
LOOK_EVERY_S = 5.0  # or a twentieth of the timeout, if that is less
# In looks: a rank's progress is known to all after two, the timer comes then, and who has reported
# waits for those that did not yet.
TIMER_LOOKS, GRACE_LOOKS = 3, 5
REPORT_S = 30.0  # what a report may take
NUM_SHOWN = 5  # unfinished collectives
C10D = "torch.distributed.distributed_c10d"


class Watchdog:
    """Watches from now on, until `stop`; a context manager.

    Args:
        logs: a directory that all ranks share; a report is left there in `watchdog_rank_R.txt`, and
            its first line in SHARED_FILE. (An empty one is that of a process that was killed.)
        timeout_s: how long no rank makes progress until all end; 0: nothing is watched.
    """

    def __init__(self, logs: Path, timeout_s: float, rank: int) -> None:
        self._timeout_s, self._rank = timeout_s, rank
        self._look_every_s = min(LOOK_EVERY_S, timeout_s / 20)
        self._phase = "start"
        self._moved = self._noted = self._job_moved = time.monotonic()
        self._stopped = threading.Event()
        if not timeout_s:
            self._stopped.set()
            return
        logs.mkdir(parents=True, exist_ok=True)
        self._path = logs / f"watchdog_rank_{rank}.txt"
        self._file = self._path.open("ab", buffering=0)  # open for the timer, which opens none
        self._pulse = _Pulse(logs / SHARED_FILE)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Tell of progress; from any thread, as often as one likes."""
        self._moved = time.monotonic()

    def enter(self, phase: str) -> None:
        """Tell of the phase that begins now; of none ("") where one has ended. Progress as well."""
        self._phase = phase or f"after {self._phase}"
        self.beat()

    def stop(self) -> None:
        """Watch no more: once this has returned, the process is not ended from here."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        with contextlib.suppress(OSError):  # of no consequence any more
            if not self._path.stat().st_size:
                self._path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # the rest is the thread's

    def _watch(self) -> None:
        while True:
            self._wind_up(self._limit_s + TIMER_LOOKS * self._look_every_s)
            if self._stopped.wait(self._look_every_s):
                return
            if trouble := self._trouble():
                self._end(trouble)

    @property
    def _limit_s(self) -> float:
        """Longer where files are read and written: nothing is told of while that goes on."""
        return self._timeout_s * (FILE_PATIENCE if self._phase in FILE_PHASES else 1)

    def _wind_up(self, timeout_s: float) -> None:
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=self._file)

    def _trouble(self) -> str:
        """Why the process is to end; empty while the job goes on."""
        now, has_moved = time.monotonic(), self._pulse.has_moved()
        if self._pulse.has_alarm:
            return f"another rank told of a stall in {SHARED_FILE}"
        if not has_moved and self._moved > self._noted:
            self._pulse.touch()
            has_moved = True
        self._noted = self._moved
        if has_moved:
            self._job_moved = now
        idle_s = now - self._job_moved
        if idle_s <= self._limit_s:
            return ""
        return f"no rank for {idle_s:.0f} s; watchdog.timeout_s is {self._timeout_s:g}"

    def _end(self, trouble: str) -> None:
        """Report, wait for the other ranks' reports, and end the process."""
        grace_s = GRACE_LOOKS * self._look_every_s
        self._wind_up(grace_s + REPORT_S)  # what hangs a process may hang its report
        idle_s = time.monotonic() - self._moved
        headline = (
            f"{time.strftime('%Y-%m-%d %H:%M:%S')} watchdog: rank {self._rank} on "
            f"{socket.gethostname()} (process {os.getpid()}) has made no progress for "
            f"{idle_s:.0f} s, phase: {self._phase} ({trouble})\n"
        )
        self._pulse.alarm(headline)
        for file in (self._file.fileno(), sys.__stderr__.fileno()):
            with contextlib.suppress(OSError):  # a full disk keeps no process
                os.write(file, headline.encode() + _calls().encode())
                faulthandler.dump_traceback(file)
        for file in (self._file.fileno(), sys.__stderr__.fileno()):  # last: it asks the driver
            with contextlib.suppress(OSError):
                os.write(file, _recorded().encode())
        if not self._stopped.wait(grace_s):
            os._exit(EXIT_CODE)


class _Pulse:
    """A file that whoever makes progress touches, and whoever reports writes a line to.

    Machines' clocks are not compared: it matters only that the file has changed. What a file system
    fails at is no progress, and no alarm.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()
        found = path.stat()
        self._touched_ns, self._first_size = found.st_mtime_ns, found.st_size
        self.has_alarm = False

    def has_moved(self) -> bool:
        """True if somebody else has touched it since the last look."""
        with contextlib.suppress(OSError):
            found = self._path.stat()
            before, self._touched_ns = self._touched_ns, found.st_mtime_ns
            self.has_alarm = found.st_size > self._first_size
            return found.st_mtime_ns != before
        return False

    def touch(self) -> None:
        with contextlib.suppress(OSError):
            self._path.touch()
            self._touched_ns = self._path.stat().st_mtime_ns

    def alarm(self, line: str) -> None:
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(line)


def _calls() -> str:
    """The torch.distributed call that the main thread is in, and where from."""
    frame, name, where = sys._current_frames().get(threading.main_thread().ident), "", ""
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if module == C10D:
            name, where = frame.f_code.co_name, ""
        elif name and not where and not module.startswith("torch."):
            where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    if not name:
        return "the main thread is in no call of torch.distributed\n"
    return f"the main thread is in {name}, called at {where}\n"


def _recorded() -> str:
    """What torch's flight recorder holds of collectives that have not ended, or of the last one.

    As JSON: its other form, with stacks, crashes when another thread asks for it (torch 2.13).
    """
    torchs = sys.modules.get("torch._C._distributed_c10d")
    lines = []
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):  # gloo, NCCL
        if dump := getattr(torchs, name, None):
            found = json.loads(dump() or "{}").get("entries", [])
            pending = [entry for entry in found if not entry["retired"]]
            lines += [f"not ended: {_told(e)}, {e['state']}" for e in pending[:NUM_SHOWN]]
            lines += [f"the last to end: {_told(e)}" for e in found[-1:] if not pending]
    return "".join(f"{line}\n" for line in lines)


def _told(entry: dict[str, Any]) -> str:
    group, description = entry["process_group"]
    return (
        f"{entry['profiling_name']} number {entry['collective_seq_id']} of group {group} "
        f"({description}), of {entry['input_sizes']} {entry['input_dtypes']}"
    )
