"""What a recipe does not say and its time depends on: how long answers are, how many serve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from megatron_nft.config import Config
from megatron_nft.plan.shape import samples
from megatron_nft.rollout.collect import MOST_ASKED
from megatron_nft.rows import read_rows

SIGMA = 0.8  # of the logarithm of answers' lengths, as in benchmarks/packing.py
NUM_QUANTILES = 512
FULL = 1 / 3  # of the greatest length, where nothing is said about the mean


@dataclass(frozen=True)
class Workload:
    """Lengths in tokens. Answers are log-normal, cut at the recipe's greatest length."""

    prompt_tokens: float
    answer_tokens: float
    mixed: float  # the share of asked groups that has right and wrong answers
    longest_answer: int
    num_asked: float  # groups, each time that engines are asked; 0: nothing is sampled
    num_trained: int  # groups a rollout
    num_answers: int  # of a group
    passes_before: int = 1  # old log-probabilities, and those of a reference in other programs
    num_asks: int = 1  # a rollout
    finish_fraction: float = 1.0  # of an ask's answers; the rest is cut off
    evaluated: tuple[tuple[int, int], ...] = ()  # each set's questions, and answers to each

    @property
    def sequence_tokens(self) -> float:
        return self.prompt_tokens + self.answer_tokens

    @property
    def trained_tokens(self) -> float:
        """Of a rollout, prompts included."""
        return self.num_trained * self.num_answers * self.sequence_tokens

    @property
    def num_evaluated(self) -> int:
        """Answers of one evaluation."""
        return sum(questions * answers for questions, answers in self.evaluated)

    def lengths(self, number: int = NUM_QUANTILES) -> np.ndarray:
        """float64 [number], of so many answers, the shortest first."""
        return _lengths(self.answer_tokens, self.longest_answer, number)

    @property
    def attended(self) -> float:
        """Σn²/Σn over sequences: what a token's attention goes with, twice its mean context."""
        lengths = self.prompt_tokens + self.lengths()
        return float((lengths**2).sum() / lengths.sum())


def workload_of(
    config: Config, *, answer_tokens: float = 0, prompt_tokens: float = 0, mixed: float = 0.5
) -> Workload:
    """The recipe's, with assumptions where nothing (0) is said.

    Raises:
        ValueError: a value that cannot be.
    """
    rollout, longest = config.rollout, config.rollout.max_response_tokens
    answer_tokens = answer_tokens or FULL * longest
    prompt_tokens = prompt_tokens or min(200.0, config.data.max_prompt_tokens)
    _check("--answer-tokens", answer_tokens, longest)
    _check("--prompt-tokens", prompt_tokens, config.data.max_prompt_tokens)
    _check("--mixed", mixed, 1)
    is_sampled = samples(config)
    num_asked, num_asks = _asked(config, mixed) if is_sampled else (0.0, 0)
    return Workload(
        prompt_tokens,
        answer_tokens,
        mixed if is_sampled else 1.0,
        longest,
        num_asked=num_asked,
        num_trained=rollout.questions,
        num_answers=rollout.answers if is_sampled else 1,
        passes_before=int(is_sampled and config.old_logp == "trainer"),
        num_asks=num_asks,
        finish_fraction=rollout.finish_fraction,
        evaluated=_evaluated(config),
    )


def _asked(config: Config, mixed: float) -> tuple[float, int]:
    """Groups of an ask, and the asks until a batch is full: rollout/collect.py."""
    rollout = config.rollout
    share = mixed * rollout.finish_fraction
    most = MOST_ASKED * rollout.questions
    asked = rollout.questions_asked or min(most, rollout.questions / share)
    return asked, min(rollout.max_asks, math.ceil(rollout.questions / (share * asked) - 1e-9))


def _evaluated(config: Config) -> tuple[tuple[int, int], ...]:
    """Of the sets whose files are here."""
    sets = [source for source in config.evaluate.sets if Path(source.path).is_file()]
    return tuple((sum(1 for _ in read_rows(Path(s.path), {"answer"})), s.samples) for s in sets)


def _check(name: str, value: float, greatest: float) -> None:
    if not 0 < value <= greatest:
        raise ValueError(f"{name} was {value:g}; it may be above 0 and at most {greatest:g}")


def _lengths(mean: float, longest: int, number: int) -> np.ndarray:
    """Quantiles of a log-normal length whose mean is this one after it is cut at the longest."""
    shares = (np.arange(number) + 0.5) / number
    shape = np.exp(SIGMA * np.array([NormalDist().inv_cdf(share) for share in shares]))
    low, high = 0.0, 1e3 * longest
    for _ in range(60):
        middle = (low + high) / 2
        is_short = np.minimum(middle * shape, longest).mean() < mean
        low, high = (middle, high) if is_short else (low, middle)
    return np.clip(high * shape, 1, longest)
