"""The verifier: answers in, judgements out, while others are still being sampled."""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition
from types import TracebackType
from typing import NamedTuple, Self

from megatron_nft.config import RuleConfig, VerifyConfig
from megatron_nft.rollout.groups import Judgement, Verdict
from megatron_nft.verify.pool import Pool
from megatron_nft.verify.rules import rule_of
from megatron_nft.verify.tasks import Task

MAX_CACHED = 2**15  # judgements
MAX_WAITING = 2**14  # answers; who has more waits


class Question(NamedTuple):
    """An answer as it was written, the known one, and how to compare them."""

    text: str
    gold: str
    rule: RuleConfig = RuleConfig()


class Verifier:
    """Judges answers in worker processes; a context manager, for use from any threads.

    What was judged before, or is being judged, is not judged again. `counts` is for the metrics,
    Pool's and:

    - judged: answers that got a verdict, of any kind
    - cached: those of them that an identical answer had got before

    `on_progress` is called at every judgement of a worker's.
    """

    def __init__(
        self, options: VerifyConfig, on_progress: Callable[[], object] = lambda: None
    ) -> None:
        self._on_progress = on_progress
        self._changed = Condition()  # guards all below
        self._cache: OrderedDict[Task, Judgement] = OrderedDict()
        self._waiting: defaultdict[Task, list[_Request]] = defaultdict(list)
        self._counts = Counter(judged=0, cached=0)
        self._is_closed = False
        self._pool = Pool(options, self._hear, self._end)

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
        """End the workers; returns when they are gone. What waits ends in a RuntimeError."""
        self._pool.close()

    @property
    def counts(self) -> Counter[str]:
        return Counter(self._counts | self._pool.counts)

    def submit(self, questions: Sequence[Question]) -> Future[list[Judgement]]:
        """A judgement for each, in their order, once all are there.

        Waits where too many are waiting already. The future raises ValueError where a rule cannot
        be used, RuntimeError if no worker starts.
        """
        return self._submit(
            [Task(rule_of(q.rule).extract(q.text), q.gold, q.rule) for q in questions]
        )

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        """The verdicts that `submit` promises, waited for."""
        return [judgement.verdict for judgement in self.submit(questions).result()]

    def read(self, golds: Iterable[tuple[str, RuleConfig]]) -> list[Judgement]:
        """CORRECT for known answers that others can be compared with; of the rest, why not."""
        return self._submit([Task(None, *gold, is_reading=True) for gold in golds]).result()

    def _submit(self, asked: list[Task]) -> Future[list[Judgement]]:
        request = _Request(asked)
        with self._changed:
            num_fresh = sum(self._take(task, request) for task in dict.fromkeys(asked))
            self._counts.update(judged=len(asked), cached=len(asked) - num_fresh)
            request.is_taken = True
            request.finish()
        return request.future

    def _take(self, task: Task, request: "_Request") -> bool:
        """True for a task that nobody asked for yet."""
        if known := self._cache.get(task):
            self._cache.move_to_end(task)
            request.found[task] = known
            return False
        if judgement := _at_once(task):
            request.found[task] = judgement
            return True
        self._changed.wait_for(lambda: len(self._waiting) < MAX_WAITING or self._is_closed)
        if self._is_closed:
            raise RuntimeError("this Verifier is closed")
        is_fresh = task not in self._waiting
        self._waiting[task].append(request)
        request.missing.add(task)
        if is_fresh:
            self._pool.ask(task)
        return is_fresh

    def _hear(self, task: Task, outcome: Judgement | Exception) -> None:
        """In the pool's thread."""
        self._on_progress()
        with self._changed:
            if isinstance(outcome, Judgement):
                self._remember(task, outcome)
            self._settle(task, outcome)

    def _end(self, error: BaseException | None) -> None:
        """In the pool's thread, at its end."""
        why = f"the verifier ended: {error!r}" if error else "the verifier was closed meanwhile"
        with self._changed:
            self._is_closed = True
            for task in list(self._waiting):
                self._settle(task, RuntimeError(why))

    def _settle(self, task: Task, outcome: Judgement | Exception) -> None:
        for request in self._waiting.pop(task, []):
            request.hear(task, outcome)
        self._changed.notify_all()

    def _remember(self, task: Task, judgement: Judgement) -> None:
        """But not what could not be judged: the host may have been slow."""
        if judgement.verdict is Verdict.UNVERIFIABLE:
            return
        self._cache[task] = judgement
        if len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)


@dataclass
class _Request:
    """Tasks that were asked for together."""

    tasks: list[Task]
    missing: set[Task] = field(default_factory=set)
    found: dict[Task, Judgement] = field(default_factory=dict)
    future: Future[list[Judgement]] = field(default_factory=Future)
    is_taken: bool = False  # all of them

    def hear(self, task: Task, outcome: Judgement | Exception) -> None:
        self.missing.discard(task)
        if isinstance(outcome, Judgement):
            self.found[task] = outcome
            self.finish()
        elif not self.future.done():
            self.future.set_exception(outcome)

    def finish(self) -> None:
        if self.is_taken and not self.missing and not self.future.done():
            self.future.set_result([self.found[task] for task in self.tasks])


def _at_once(task: Task) -> Judgement | None:
    rule = rule_of(task.rule)
    return None if task.is_reading else rule.decide_at_once(task.extracted, task.gold)
