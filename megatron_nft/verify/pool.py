"""The verifier's processes: a hard deadline per answer, and nothing that failed looks wrong.

The workers are programs of their own (`worker.py`): they inherit nothing of torch, CUDA, vLLM or
gloo, do not import the caller's `__main__` again, and end when the caller does.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_nft.config import VerifyConfig
from megatron_nft.rollout.groups import Verdict
from megatron_nft.verify.answers import decide_unparsed, extract

STARTUP_TIMEOUT_S = 300.0  # seen: 2 s on an idle host, 60 s on an overloaded one
GRACE_S = 1.0  # by which a worker may be late in reporting a missed deadline itself
MAX_FAILED_STARTS = 3
MAX_ATTEMPTS = 2
MAX_CACHED = 2**15
PACKAGE_ROOT = Path(__file__).parents[2]

Pair = tuple[str | None, str]  # (extracted answer, gold answer): all that a verdict depends on


class Verifier:
    """Judges answers in worker processes; a context manager, for use from one thread at a time.

    Constructing returns at once: the workers import while the caller goes on. An answer that
    takes longer than `timeout_s` is UNVERIFIABLE; one whose worker died is judged once more, and
    then UNVERIFIABLE. `counts` is for the metrics:

    - judged: answers that got a verdict, of any kind
    - cached: those of them that an identical answer had got before
    - timeouts: deadlines missed
    - worker_deaths: workers that ended by themselves or were killed from outside
    """

    def __init__(self, config: VerifyConfig) -> None:
        self.counts = Counter(judged=0, cached=0, timeouts=0, worker_deaths=0)
        self._timeout_s = config.timeout_s
        self._cache: OrderedDict[Pair, Verdict] = OrderedDict()
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._num_failed_starts = 0
        for _ in range(config.workers or len(os.sched_getaffinity(0))):
            self._start_worker()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; returns when they are gone."""
        for worker in list(self._workers):
            self._end_worker(worker)
        self._selector.close()

    def judge(self, items: Sequence[tuple[str, str]]) -> list[Verdict]:
        """One verdict per (text, gold), in their order. Raises RuntimeError if no worker starts."""
        if not self._workers:
            raise RuntimeError("this Verifier is closed")
        pairs = [(extract(text), gold) for text, gold in items]
        distinct = dict.fromkeys(pairs)
        known = {pair: verdict for pair in distinct if (verdict := self._recall(pair))}
        fresh = {pair: decide_unparsed(*pair) for pair in distinct if pair not in known}
        asked = self._ask_workers([pair for pair, verdict in fresh.items() if verdict is None])
        verdicts = known | fresh | asked
        self.counts["judged"] += len(pairs)
        self.counts["cached"] += len(pairs) - len(fresh)
        return [verdicts[pair] for pair in pairs]

    def _recall(self, pair: Pair) -> Verdict | None:
        if pair in self._cache:
            self._cache.move_to_end(pair)
        return self._cache.get(pair)

    def _remember(self, pair: Pair, verdict: Verdict) -> None:
        self._cache[pair] = verdict
        if len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)

    def _ask_workers(self, pairs: list[Pair]) -> dict[Pair, Verdict]:
        waiting = deque(_Task(pair) for pair in pairs)
        verdicts: dict[Pair, Verdict] = {}
        try:
            while len(verdicts) < len(pairs):
                self._hand_out(waiting)
                # Whoever has answered is heard before deadlines are looked at: a parent that was
                # held up itself must not take it out on the answers.
                for key, _ in self._selector.select(self._patience_s()):
                    self._hear(key.data, waiting, verdicts)
                self._enforce_deadlines(verdicts)
        finally:
            # After an exception, a late verdict must not pass for that of a later answer.
            for worker in [w for w in self._workers if w.task]:
                self._replace_worker(worker)
        return verdicts

    def _hand_out(self, waiting: deque["_Task"]) -> None:
        for worker in list(self._workers):
            if waiting and worker.is_idle:
                try:
                    worker.send(waiting[0], self._timeout_s)
                except BrokenPipeError:
                    self.counts["worker_deaths"] += 1
                    self._replace_worker(worker)
                else:
                    waiting.popleft()

    def _patience_s(self) -> float:
        return max(0.0, min(w.deadline_s for w in self._workers) - time.monotonic())

    def _hear(
        self, worker: "_Worker", waiting: deque["_Task"], verdicts: dict[Pair, Verdict]
    ) -> None:
        message = worker.receive()
        if not message:
            self._lose(worker, waiting, verdicts)
        elif message == "ready\n":
            self._num_failed_starts = 0
            worker.rest()
        elif message == "timeout\n":
            self._give_up(worker, verdicts)
            worker.rest()
        else:
            verdict = verdicts[worker.task.pair] = Verdict(message.rstrip())
            self._remember(worker.task.pair, verdict)
            worker.rest()

    def _lose(
        self, worker: "_Worker", waiting: deque["_Task"], verdicts: dict[Pair, Verdict]
    ) -> None:
        """A worker ended without being told to: its answer, if any, gets a second chance."""
        self.counts["worker_deaths"] += 1
        if not worker.is_ready:
            self._count_failed_start(f"ended with exit code {worker.process.wait()}")
        task = worker.task
        if task and task.num_attempts < MAX_ATTEMPTS:
            waiting.append(task)
        elif task:
            verdicts[task.pair] = Verdict.UNVERIFIABLE
        self._replace_worker(worker)

    def _enforce_deadlines(self, verdicts: dict[Pair, Verdict]) -> None:
        now = time.monotonic()
        for worker in [w for w in self._workers if w.deadline_s <= now]:
            if worker.is_ready:
                self._give_up(worker, verdicts)
            else:
                self._count_failed_start(f"was not ready after {STARTUP_TIMEOUT_S:.0f} s")
            self._replace_worker(worker)

    def _give_up(self, worker: "_Worker", verdicts: dict[Pair, Verdict]) -> None:
        self.counts["timeouts"] += 1
        verdicts[worker.task.pair] = Verdict.UNVERIFIABLE  # not cached: the host may have been slow

    def _count_failed_start(self, what: str) -> None:
        self._num_failed_starts += 1
        if self._num_failed_starts >= MAX_FAILED_STARTS:
            raise RuntimeError(
                f"a verifier worker {what} while starting, the {MAX_FAILED_STARTS}rd time in a "
                f"row; its own message is on stderr, or try: {' '.join(_command(self._timeout_s))}"
            )

    def _replace_worker(self, worker: "_Worker") -> None:
        self._end_worker(worker)
        self._start_worker()

    def _start_worker(self) -> None:
        worker = _Worker(_spawn(self._timeout_s), time.monotonic() + STARTUP_TIMEOUT_S)
        self._workers.append(worker)
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def _end_worker(self, worker: "_Worker") -> None:
        self._workers.remove(worker)
        self._selector.unregister(worker.process.stdout)
        worker.end()


@dataclass
class _Task:
    pair: Pair
    num_attempts: int = 0


@dataclass(eq=False)
class _Worker:
    """A process that imports (not ready), waits (idle) or judges one answer (has a task)."""

    process: subprocess.Popen[bytes]
    deadline_s: float  # on the monotonic clock: to be ready, or to give its verdict
    is_ready: bool = False
    task: _Task | None = field(default=None)

    @property
    def is_idle(self) -> bool:
        return self.is_ready and self.task is None

    def rest(self) -> None:
        self.is_ready, self.task, self.deadline_s = True, None, inf

    def send(self, task: _Task, timeout_s: float) -> None:
        """Raises BrokenPipeError if the process is gone; `task` then counts as not attempted."""
        self.process.stdin.write(json.dumps(task.pair).encode() + b"\n")  # ASCII escapes
        self.process.stdin.flush()
        task.num_attempts += 1
        self.task, self.deadline_s = task, time.monotonic() + timeout_s + GRACE_S

    def receive(self) -> str:
        """One line, or "" at the end of the stream.

        One read is one whole message: a worker has at most one to give, and writes it at once.
        """
        return os.read(self.process.stdout.fileno(), 256).decode()

    def end(self) -> None:
        if self.process.returncode is None:  # not yet waited for: the group's id is still its own
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # what a failed write left in the buffer
            self.process.stdin.close()


def _command(timeout_s: float) -> list[str]:
    # -P: the working directory is no place to import from
    return [sys.executable, "-P", "-m", "megatron_nft.verify.worker", str(timeout_s)]


def _spawn(timeout_s: float) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
    # numpy would reserve memory for a thread a core, against the worker's limit
    env = os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        _command(timeout_s),
        stdin=pipe,
        stdout=pipe,
        env=env,
        process_group=0,  # a worker and its judge are ended together; Ctrl-C is the caller's
    )
