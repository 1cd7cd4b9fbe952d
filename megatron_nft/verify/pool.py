"""Worker processes that judge tasks, in a thread's care: a hard deadline for each of them.

Nothing that failed looks wrong: a task whose deadline passed is UNVERIFIABLE; one whose worker died
is judged once more, and then UNVERIFIABLE.
"""

import contextlib
import os
import selectors
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace

from megatron_nft.config import VerifyConfig
from megatron_nft.rollout.groups import Judgement, Verdict
from megatron_nft.verify import process, tasks
from megatron_nft.verify.process import Attempt, Worker
from megatron_nft.verify.tasks import Task

MAX_FAILED_STARTS = 3
MAX_ATTEMPTS = 2

Tell = Callable[[Task, Judgement | Exception], None]
End = Callable[[BaseException | None], None]


class Pool:
    """Starts at once and returns: the workers import while the caller goes on.

    `tell(task, outcome)` is called once a task, in the pool's thread: a judgement, a ValueError
    where the task's rule cannot be used, or a RuntimeError for every task once no worker starts;
    `end(error)` last of all, with what ended the pool if that was no `close`.
    `counts` has `timeouts`, deadlines missed, and `worker_deaths`, workers that ended by
    themselves or were killed from outside.
    """

    def __init__(self, options: VerifyConfig, tell: Tell, end: End) -> None:
        num_workers = options.workers or len(os.sched_getaffinity(0))
        self._options = replace(options, workers=num_workers)
        self._tell, self._end = tell, end
        self.counts = Counter(timeouts=0, worker_deaths=0)
        self.workers: list[Worker] = []
        self._waiting: deque[Attempt] = deque()
        self._num_failed_starts = 0
        self._failure: RuntimeError | None = None
        self._is_closing = False
        self._selector = selectors.DefaultSelector()
        self._doorbell, self._door = os.pipe()  # read end, write end
        os.set_blocking(self._door, False)  # a full pipe rings as well
        self._selector.register(self._doorbell, selectors.EVENT_READ)
        for _ in range(num_workers):
            self._start_worker()
        self._thread = threading.Thread(target=self._run, name="verifier", daemon=True)
        self._thread.start()

    def ask(self, task: Task) -> None:
        """Have a task judged; from any thread."""
        self._waiting.append(Attempt(task))
        self._ring()

    def close(self) -> None:
        """End the workers; returns when they are gone. What waited is not told of."""
        if self._is_closing:
            return
        self._is_closing = True
        self._ring()
        self._thread.join()
        os.close(self._door)
        os.close(self._doorbell)

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._door, b".")

    # the rest is the thread's

    def _run(self) -> None:
        try:
            while not self._is_closing:
                self._turn()
        finally:
            error = sys.exception()
            try:
                for worker in list(self.workers):
                    self._end_worker(worker)
                self._selector.close()
            finally:
                self._end(error)

    def _turn(self) -> None:
        if self._failure:
            self._refuse_all()
        else:
            self._hand_out()
        # Whoever has answered is heard before deadlines are looked at: a process that was held up
        # itself must not take it out on the answers.
        for key, _ in self._selector.select(self._patience_s()):
            if key.fd == self._doorbell:
                os.read(self._doorbell, 2**16)
            else:
                self._hear(key.data)
        self._enforce_deadlines()

    def _hand_out(self) -> None:
        for worker in list(self.workers):
            if self._waiting and worker.is_idle:
                attempt = self._waiting.popleft()
                try:
                    worker.send(attempt)
                except BrokenPipeError:
                    self.counts["worker_deaths"] += 1
                    self._waiting.appendleft(attempt)
                    self._replace_worker(worker)

    def _refuse_all(self) -> None:
        while self._waiting:
            self._tell(self._waiting.popleft().task, self._failure)

    def _patience_s(self) -> float | None:
        if not self.workers:
            return None
        return max(0.0, min(min(w.deadline_s for w in self.workers) - time.monotonic(), 3600.0))

    def _hear(self, worker: Worker) -> None:
        message = worker.receive()
        if not message:
            self._lose(worker)
        elif message == tasks.READY:
            self._num_failed_starts = 0
            worker.rest()
        elif message == tasks.TIMEOUT:
            self._give_up(worker)
            worker.rest()
        else:
            outcome = tasks.decode_reply(message)
            task = worker.attempt.task
            worker.rest()
            self._tell(task, ValueError(outcome) if isinstance(outcome, str) else outcome)

    def _lose(self, worker: Worker) -> None:
        """A worker ended without being told to: its answer, if any, gets a second chance."""
        self.counts["worker_deaths"] += 1
        if not worker.is_ready:
            self._count_failed_start(f"ended with exit code {worker.process.wait()}")
        attempt = worker.attempt
        if attempt and attempt.number < MAX_ATTEMPTS:
            self._waiting.append(attempt)
        elif attempt:
            reason = f"its worker died, {MAX_ATTEMPTS} times"
            self._tell(attempt.task, Judgement(Verdict.UNVERIFIABLE, reason, is_failure=True))
        self._replace_worker(worker)

    def _enforce_deadlines(self) -> None:
        now = time.monotonic()
        for worker in [w for w in self.workers if w.deadline_s <= now]:
            if worker.is_ready:
                self._give_up(worker)
            else:
                waited = f"was not ready after {process.STARTUP_TIMEOUT_S:.0f} s"
                self._count_failed_start(waited)
            self._replace_worker(worker)

    def _give_up(self, worker: Worker) -> None:
        self.counts["timeouts"] += 1
        reason = f"not judged within {self._options.timeout_s:g} s"
        failure = Judgement(Verdict.UNVERIFIABLE, reason, is_failure=True)
        self._tell(worker.attempt.task, failure)

    def _count_failed_start(self, what: str) -> None:
        self._num_failed_starts += 1
        has_others = any(worker.is_ready for worker in self.workers)
        if self._num_failed_starts >= MAX_FAILED_STARTS and not has_others:
            self._failure = RuntimeError(
                f"a verifier worker {what} while starting, the {self._num_failed_starts}rd time in "
                "a row; its own message is on stderr, or try: "
                + " ".join(process.command(self._options))
            )

    def _replace_worker(self, worker: Worker) -> None:
        self._end_worker(worker)
        if not self._failure:
            self._start_worker()

    def _start_worker(self) -> None:
        worker = Worker(self._options)
        self.workers.append(worker)
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def _end_worker(self, worker: Worker) -> None:
        self.workers.remove(worker)
        self._selector.unregister(worker.process.stdout)
        worker.end()
