"""Dynamic sampling: ask, answer, judge, and keep mixed groups until the batch is full."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_nft.config import RolloutConfig
from megatron_nft.notice import Interrupted
from megatron_nft.rollout.engine import Engine, Sampling
from megatron_nft.rollout.groups import Group, Judgement, Problem, Response, Verdict
from megatron_nft.rollout.questions import Experience, QuestionOrder
from megatron_nft.rollout.tally import EXCERPT_CHARS, Tally
from megatron_nft.verify.verifier import Question, Verifier

MOST_ASKED = 3  # times the groups of a batch at once: the official code's fixed number


@dataclass(frozen=True)
class Asked:
    """What came of some questions."""

    mixed: list[Group]  # in the order of the questions, without texts
    tally: Tally  # of all groups
    cut: list[Problem]  # whose answers were not waited for
    tallies: dict[str, Tally] = field(default_factory=dict)  # of the groups of each kind


@dataclass(frozen=True)
class Batch:
    """What one rollout trains on, and what was seen on the way."""

    groups: list[Group]
    tally: Tally | None  # None: nothing was sampled


Ask = Callable[[Sequence[Problem], Sequence[float], int], Asked]


class Collector:
    """Makes batches of mixed groups; what is left over of one goes into the next.

    Every process that asks its own engine has one, with the same content.
    """

    def __init__(self, order: QuestionOrder, options: RolloutConfig) -> None:
        self._order, self._options = order, options
        self.experience = Experience()
        self.surplus: list[Group] = []  # mixed groups that a full batch had no place for
        self.cut: list[Problem] = []  # to be asked before any other

    def batch(self, ask: Ask, oldest: int) -> Batch:
        """Mixed groups for one rollout, at most `options.questions` of them.

        `ask(problems, expected tokens, attempt)` samples and judges. Surplus of earlier rollouts
        comes first, unless weights before version `oldest` sampled it.

        Raises:
            Interrupted: sampling was abandoned. After this, as after any other error, the next
                batch begins where this one did.
            RuntimeError: no mixed group at all within `max_asks`, or too few of them where
                `on_short_batch` is stop; the message holds the accuracies seen.
        """
        before = self._order.position, self.surplus, self.cut
        made = None
        try:
            made = self._batch(ask, oldest)
        finally:
            if made is None:
                self._order.position, self.surplus, self.cut = before
        return made

    def _batch(self, ask: Ask, oldest: int) -> Batch:
        options, tally = self._options, Tally()
        kept = [group for group in self.surplus if group.version >= oldest]
        self.surplus = []
        for attempt in range(options.max_asks):
            if len(kept) >= options.questions:
                break
            problems = self._take(self._num_to_ask(options.questions - len(kept), tally))
            asked = ask(problems, self.experience.expected_tokens(problems), attempt)
            self.cut = asked.cut + self.cut
            tally.merge(asked.tally)
            kept += asked.mixed
        if len(kept) < options.questions:
            self._accept_short(kept, tally)
        self.experience.add(tally)
        if options.keep_surplus:
            self.surplus = kept[options.questions :]
        return Batch(kept[: options.questions], tally)

    def _num_to_ask(self, num_wanted: int, so_far: Tally) -> int:
        most = MOST_ASKED * self._options.questions
        asked = self._options.questions_asked
        return asked or self.experience.num_to_ask(num_wanted, so_far, most)

    def _take(self, num: int) -> list[Problem]:
        """The questions that were cut off, then new ones."""
        again, self.cut = self.cut[:num], self.cut[num:]
        return again + self._order.take(num - len(again))

    def _accept_short(self, kept: list[Group], tally: Tally) -> None:
        options = self._options
        if kept and options.on_short_batch == "train":
            return
        remedy = ", or set rollout.on_short_batch=train" if kept else ""
        raise RuntimeError(
            f"{options.max_asks} times asked, {tally.num_groups} questions gave {len(kept)} groups "
            f"with right and wrong answers, wanted {options.questions}; groups by accuracy: "
            f"{tally.histogram()}. Raise rollout.max_asks{remedy}; or begin a run with questions "
            "of another difficulty or more rollout.answers"
        )


def ask(
    engine: Engine,
    verifier: Verifier | None,
    problems: Sequence[Problem],
    expected: Sequence[float],
    sampling: Sampling,
    kinds: Sequence[str] = (),
) -> Asked:
    """Sample and judge; collective where every process has its own engine.

    Every process gets all mixed groups then. Groups that nobody trains on stay where they were
    sampled; the tally counts them too.

    Args:
        kinds: of each problem, where nobody trains on them: for tallies of their own; what the
            verifier failed at is in the tally of all alone.

    Raises:
        Interrupted: sampling was abandoned, by this process or another.
    """
    try:
        part: Any = _sample_and_judge(engine, verifier, problems, expected, sampling, kinds)
    except Interrupted:
        part = None
    parts = [part]
    if engine.is_collective:
        parts *= dist.get_world_size()
        dist.all_gather_object(parts, part)
    if None in parts:
        raise Interrupted
    return _together(parts, problems)


class _Part(NamedTuple):
    """What came of the questions that one process asked."""

    mixed: list[tuple[int, Group]]  # by the problems' indices
    tally: Tally
    answered: list[int]  # problems, by their indices
    tallies: dict[str, Tally]


def _sample_and_judge(
    engine: Engine,
    verifier: Verifier | None,
    problems: Sequence[Problem],
    expected: Sequence[float],
    sampling: Sampling,
    kinds: Sequence[str],
) -> _Part:
    tally, mixed, tallies = Tally(), [], {kind: Tally() for kind in kinds}
    if verifier is None:
        answers = engine.generate(problems, expected, sampling)
        return _Part(mixed, tally, [index for index, _ in answers], tallies)
    before = verifier.counts
    judging = _Judging(verifier, problems)
    answers = engine.generate(problems, expected, sampling, judging.hear)
    for index, responses in answers:
        group, examples = judging.group(index, responses)
        for one in (tally, tallies[kinds[index]]) if kinds else (tally,):
            one.add(group)
            one.show(examples)
        if group.is_mixed and not kinds:
            mixed.append((index, _without_text(group)))
    tally.failures = verifier.counts - before
    return _Part(mixed, tally, [index for index, _ in answers], tallies)


def _together(parts: Sequence[_Part], problems: Sequence[Problem]) -> Asked:
    whole, tallies = Tally(), {kind: Tally() for kind in parts[0].tallies}
    for part in parts:
        whole.merge(part.tally)
        for kind, tally in part.tallies.items():
            tallies[kind].merge(tally)
    found = sorted((item for part in parts for item in part.mixed), key=lambda item: item[0])
    answered = {index for part in parts for index in part.answered}
    cut = [problem for index, problem in enumerate(problems) if index not in answered]
    whole.num_cut = len(cut)
    return Asked([group for _, group in found], whole, cut, tallies)


def _without_text(group: Group) -> Group:
    """What travels to all ranks; the text has been judged."""
    return replace(group, responses=tuple(replace(r, text="") for r in group.responses))


class _Judging:
    """The answers of one batch, judged while others are still being sampled."""

    def __init__(self, verifier: Verifier, problems: Sequence[Problem]) -> None:
        self._verifier, self._problems = verifier, problems
        self._promised: dict[int, Future[list[Judgement]]] = {}

    def hear(self, index: int, responses: tuple[Response, ...]) -> None:
        """An answer that was cut off is wrong without a look at it."""
        problem = self._problems[index]
        questions = [
            Question(r.text, problem.answer, problem.rule) for r in responses if r.finish == "stop"
        ]
        self._promised[index] = self._verifier.submit(questions)

    def group(self, index: int, responses: tuple[Response, ...]) -> tuple[Group, list[str]]:
        """A problem's responses with their verdicts, waited for, and what nobody could judge."""
        problem, examples = self._problems[index], []
        judgements, judged = iter(self._promised.pop(index).result()), []
        for r in responses:
            found = next(judgements) if r.finish == "stop" else Judgement(Verdict.WRONG)
            judged.append(replace(r, verdict=found.verdict))
            if found.verdict is Verdict.UNVERIFIABLE:
                texts = (repr(text[-EXCERPT_CHARS:]) for text in (r.text, problem.answer))
                examples.append(f"{' against '.join(texts)}: {found.reason}")
        return Group(problem, tuple(judged)), examples
