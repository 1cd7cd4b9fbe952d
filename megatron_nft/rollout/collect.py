"""Dynamic sampling: ask, answer, judge, and keep mixed groups until the batch is full."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_nft.config import RolloutConfig
from megatron_nft.rollout.engine import Answers, Engine, Sampling
from megatron_nft.rollout.groups import Group, Problem, Verdict
from megatron_nft.verify.pool import Verifier


@dataclass
class Tally:
    """What was seen of all answers, kept or not."""

    verdicts: Counter[Verdict] = field(default_factory=Counter)
    finishes: Counter[str] = field(default_factory=Counter)
    accuracies: Counter[float] = field(default_factory=Counter)  # of groups
    failures: Counter[str] = field(default_factory=Counter)  # of the verifier
    num_tokens: int = 0
    num_groups: int = 0

    def add(self, group: Group) -> None:
        self.verdicts.update(r.verdict for r in group.responses)
        self.finishes.update(r.finish for r in group.responses)
        self.accuracies[group.accuracy] += 1
        self.num_tokens += sum(len(r.tokens) for r in group.responses)
        self.num_groups += 1

    def merge(self, other: "Tally") -> None:
        self.verdicts += other.verdicts
        self.finishes += other.finishes
        self.accuracies += other.accuracies
        self.failures += other.failures
        self.num_tokens += other.num_tokens
        self.num_groups += other.num_groups

    @property
    def num_mixed(self) -> int:
        """Groups with right and wrong answers, those beyond a full batch too."""
        return sum(n for accuracy, n in self.accuracies.items() if 0 < accuracy < 1)

    def metrics(self) -> dict[str, float]:
        answers = max(1, self.verdicts.total())
        judged = self.verdicts[Verdict.CORRECT] + self.verdicts[Verdict.WRONG]
        return {
            "accuracy_all": self.verdicts[Verdict.CORRECT] / max(1, judged),
            "unverifiable_rate": self.verdicts[Verdict.UNVERIFIABLE] / answers,
            "truncated_fraction": self.finishes["length"] / answers,
            "response_length_mean": self.num_tokens / answers,
            "groups_kept_fraction": self.num_mixed / max(1, self.num_groups),
            "verifier_timeouts": self.failures["timeouts"],
            "verifier_worker_deaths": self.failures["worker_deaths"],
        }

    def histogram(self) -> str:
        """The groups' accuracies, for people: `0.00: 12, 0.06: 3, …`."""
        return ", ".join(f"{a:.2f}: {n}" for a, n in sorted(self.accuracies.items()))


Ask = Callable[[Sequence[Problem], int], tuple[list[Group], Tally]]


def collect(
    ask: Ask, take: Callable[[int], list[Problem]], options: RolloutConfig
) -> tuple[list[Group], Tally]:
    """Mixed groups for one training batch, at most `options.questions` of them.

    `ask(problems, attempt)` samples and judges; `take(n)` gives the next n questions. Surplus
    groups are thrown away, as the official code does.

    Raises:
        RuntimeError: no mixed group at all within `max_asks`, or too few of them where
            `on_short_batch` is stop; the message holds the accuracies seen.
    """
    kept: list[Group] = []
    tally = Tally()
    for attempt in range(options.max_asks):
        groups, seen = ask(take(options.questions_asked), attempt)
        tally.merge(seen)
        kept += [group for group in groups if group.is_mixed]
        if len(kept) >= options.questions:
            return kept[: options.questions], tally
    if not kept or options.on_short_batch == "stop":
        remedy = ", or set rollout.on_short_batch=train" if kept else ""
        raise RuntimeError(
            f"{options.max_asks} times {options.questions_asked} questions gave {len(kept)} groups "
            f"with right and wrong answers, wanted {options.questions}; groups by accuracy: "
            f"{tally.histogram()}. Choose questions of another difficulty, or raise "
            f"rollout.answers or rollout.max_asks{remedy}"
        )
    return kept, tally


def ask(
    engine: Engine,
    verifier: Verifier | None,
    problems: Sequence[Problem],
    sampling: Sampling,
) -> tuple[list[Group], Tally]:
    """Sample and judge; collective, every rank gets all mixed groups in the problems' order.

    Groups that nobody trains on stay where they were sampled; the tally counts them too.
    """
    answered = engine.generate(problems, [1.0] * len(problems), sampling)
    tally, mixed = Tally(), []
    if verifier:
        before = Counter(verifier.counts)
        for index, group in _judge(answered, problems, verifier):
            tally.add(group)
            if group.is_mixed:
                mixed.append((index, _without_text(group)))
        tally.failures = Counter(verifier.counts) - before
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (mixed, tally))
    whole = Tally()
    for _, part in parts:
        whole.merge(part)
    found = sorted((item for groups, _ in parts for item in groups), key=lambda item: item[0])
    return [group for _, group in found], whole


def _without_text(group: Group) -> Group:
    """What travels to all ranks; the text has been judged."""
    return replace(group, responses=tuple(replace(r, text="") for r in group.responses))


def _judge(
    answered: Answers, problems: Sequence[Problem], verifier: Verifier
) -> list[tuple[int, Group]]:
    """Groups of judged responses; an answer that was cut off is wrong without a look at it."""
    asked = [(r.text, problems[i].answer) for i, rs in answered for r in rs if r.finish == "stop"]
    verdicts = iter(verifier.judge(asked))
    return [
        (
            index,
            Group(
                problems[index],
                tuple(
                    replace(r, verdict=next(verdicts) if r.finish == "stop" else Verdict.WRONG)
                    for r in responses
                ),
            ),
        )
        for index, responses in answered
    ]


class QuestionOrder:
    """The questions in a random order that the seed decides, epoch after epoch.

    `position` counts the questions taken since the run began; setting it resumes.
    """

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        self._problems, self._seed = problems, seed
        self._epoch, self._order = -1, np.zeros(0, np.int64)
        self.position = 0

    def take(self, num: int) -> list[Problem]:
        """The next `num` questions."""
        taken = [self._at(p) for p in range(self.position, self.position + num)]
        self.position += num
        return taken

    def _at(self, position: int) -> Problem:
        epoch, offset = divmod(position, len(self._problems))
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch))
            self._epoch, self._order = epoch, rng.permutation(len(self._problems))
        return self._problems[self._order[offset]]
