"""Which questions are asked next, and what earlier answers say of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, sqrt
from statistics import fmean

import numpy as np

from megatron_nft.rollout.groups import Problem
from megatron_nft.rollout.tally import Tally

DECAY = 0.5  # of what a rollout weighs in the share of mixed groups, one rollout later


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


@dataclass
class Experience:
    """What questions were like so far; every process has the same."""

    asked: float = 0.0  # questions, older ones weighing less
    mixed: float = 0.0  # of these, with right and wrong answers
    lengths: dict[str, float] = field(default_factory=dict)  # mean tokens of an answer, by problem

    def add(self, tally: Tally) -> None:
        """Learn from one rollout."""
        self.asked = DECAY * self.asked + tally.num_groups
        self.mixed = DECAY * self.mixed + tally.num_mixed
        self.lengths |= tally.lengths

    def num_to_ask(self, num_wanted: int, so_far: Tally, most: int) -> int:
        """Questions among which `num_wanted` are mixed, five times out of six; at most `most`.

        Their number is binomial: its mean minus one standard deviation is to be what is wanted.
        `so_far` is what this rollout has seen already.
        """
        mixed, asked = self.mixed + so_far.num_mixed, self.asked + so_far.num_groups
        share = (mixed + 1) / (asked + 2)  # the mean of what it may be, after so many
        spread = sqrt(1 - share)
        root = (spread + sqrt(spread**2 + 4 * num_wanted)) / 2  # of n·share
        return min(most, ceil(root**2 / share))

    def expected_tokens(self, problems: Sequence[Problem]) -> list[float]:
        """The mean length of each problem's earlier answers; that of all where there were none."""
        mean = fmean(self.lengths.values()) if self.lengths else 1.0
        return [self.lengths.get(problem.id, mean) for problem in problems]
