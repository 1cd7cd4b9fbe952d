"""What was seen of all answers of a rollout, kept or not."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_nft.rollout.groups import Group, Verdict

MAX_EXAMPLES, EXCERPT_CHARS = 5, 80


@dataclass
class Tally:
    """What was seen of all answers, kept or not."""

    verdicts: Counter[Verdict] = field(default_factory=Counter)
    finishes: Counter[str] = field(default_factory=Counter)
    accuracies: Counter[float] = field(default_factory=Counter)  # of groups
    failures: Counter[str] = field(default_factory=Counter)  # of the verifier
    lengths: dict[str, float] = field(default_factory=dict)  # mean tokens of an answer, by problem
    num_tokens: int = 0
    num_groups: int = 0
    num_cut: int = 0  # questions whose answers were not waited for
    unverifiable: list[str] = field(default_factory=list)  # a few of those answers, for people

    def add(self, group: Group) -> None:
        self.verdicts.update(r.verdict for r in group.responses)
        self.finishes.update(r.finish for r in group.responses)
        self.accuracies[group.accuracy] += 1
        num_tokens = sum(len(r.tokens) for r in group.responses)
        self.lengths[group.problem.id] = num_tokens / len(group.responses)
        self.num_tokens += num_tokens
        self.num_groups += 1

    def show(self, examples: Sequence[str]) -> None:
        """Of what nobody could judge, keep a few."""
        self.unverifiable = [*self.unverifiable, *examples][:MAX_EXAMPLES]

    def merge(self, other: "Tally") -> None:
        self.verdicts += other.verdicts
        self.finishes += other.finishes
        self.accuracies += other.accuracies
        self.failures += other.failures
        self.lengths |= other.lengths
        self.num_tokens += other.num_tokens
        self.num_groups += other.num_groups
        self.num_cut += other.num_cut
        self.show(other.unverifiable)

    @property
    def num_mixed(self) -> int:
        """Groups with right and wrong answers, those beyond a full batch too."""
        return sum(n for accuracy, n in self.accuracies.items() if 0 < accuracy < 1)

    def metrics(self) -> dict[str, float]:
        """What there is to say; where no answer was sampled, only how much there was not."""
        return self.troubles() | self.of_answers()

    def troubles(self) -> dict[str, float]:
        """What did not go as it should."""
        return {
            "questions_cut": self.num_cut,
            "verifier_timeouts": self.failures["timeouts"],
            "verifier_worker_deaths": self.failures["worker_deaths"],
        }

    def of_answers(self) -> dict[str, float]:
        """Empty where there were none."""
        if not (answers := self.verdicts.total()):
            return {}
        judged = self.verdicts[Verdict.CORRECT] + self.verdicts[Verdict.WRONG]
        return {
            "accuracy_all": self.verdicts[Verdict.CORRECT] / max(1, judged),
            "unverifiable_rate": self.verdicts[Verdict.UNVERIFIABLE] / answers,
            "truncated_fraction": self.finishes["length"] / answers,
            "response_length_mean": self.num_tokens / answers,
            "groups_kept_fraction": self.num_mixed / self.num_groups,
        }

    def histogram(self) -> str:
        """The groups' accuracies, for people: `0.00: 12, 0.06: 3, …`."""
        return ", ".join(f"{a:.2f}: {n}" for a, n in sorted(self.accuracies.items()))
