"""The records that flow through a training step: problems, responses, groups."""

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from megatron_nft.config import RuleConfig


class Verdict(enum.Enum):
    """What the verifier says of one answer; UNVERIFIABLE means that it could not tell."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNVERIFIABLE = "unverifiable"


class Judgement(NamedTuple):
    """A verdict, and why it is UNVERIFIABLE, for people."""

    verdict: Verdict
    reason: str = ""
    is_failure: bool = False  # of the verifier: another time it may be another


@dataclass(frozen=True)
class Problem:
    """A question with a known answer; `solution_tokens` where the data has worked solutions."""

    id: str
    prompt_tokens: np.ndarray  # int32 [P]
    answer: str
    source: str
    solution_tokens: np.ndarray | None = None  # int32 [T], ends with the end-of-text token
    rule: RuleConfig = field(default_factory=RuleConfig)


@dataclass(frozen=True)
class Response:
    """One sampled answer; `verdict` is None until it has been judged.

    With `seed`, the weights of `version` sample it again. A version counts the rollouts that the
    weights were trained on; where weights changed while it was sampled, it is that of the oldest.
    """

    tokens: np.ndarray  # int32 [T]
    logp: np.ndarray  # float32 [T], of each token as sampled by the engine
    finish: str  # "stop" | "length"
    text: str
    seed: int
    version: int
    verdict: Verdict | None = None

    @property
    def correct(self) -> bool:
        return self.verdict is Verdict.CORRECT

    @property
    def judged(self) -> bool:
        return self.verdict in (Verdict.CORRECT, Verdict.WRONG)


@dataclass(frozen=True)
class Group:
    """The K answers to one question."""

    problem: Problem
    responses: tuple[Response, ...]

    @property
    def version(self) -> int:
        """The oldest weights that any token was sampled by."""
        return min(r.version for r in self.responses)

    @property
    def accuracy(self) -> float:
        """r̂ of the paper: correct / judged, 0 where nothing could be judged."""
        judged = [r for r in self.responses if r.judged]
        return sum(r.correct for r in judged) / len(judged) if judged else 0.0

    @property
    def is_mixed(self) -> bool:
        """True where the group has right and wrong answers; only such groups train the policy."""
        return 0.0 < self.accuracy < 1.0


def solved(problem: Problem) -> Group:
    """The data's worked solution, as a group of one right answer."""
    tokens = problem.solution_tokens
    blank = np.zeros(len(tokens), np.float32)
    answer = Response(tokens, blank, "stop", text="", seed=0, version=0, verdict=Verdict.CORRECT)
    return Group(problem, (answer,))
