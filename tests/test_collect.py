"""Dynamic sampling: which groups are kept, when it stops, and what was seen."""

import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest

from megatron_nft.config import RolloutConfig
from megatron_nft.rollout.collect import QuestionOrder, Tally, collect
from megatron_nft.rollout.engine import seed_of
from megatron_nft.rollout.groups import Group, Problem, Response, Verdict

K = 4
VERDICTS = {"+": Verdict.CORRECT, "-": Verdict.WRONG, "?": Verdict.UNVERIFIABLE}


def problem(number: int) -> Problem:
    return Problem(str(number), np.array([number], np.int32), "1", "toy")


def group(number: int, verdicts: str) -> Group:
    """A group from `+`, `-` and `?`; the k-th answer has k + 1 tokens, wrong ones were cut off."""
    responses = tuple(
        Response(
            tokens=np.zeros(k + 1, np.int32),
            logp=np.zeros(k + 1, np.float32),
            finish="length" if mark == "-" else "stop",
            text="",
            seed=k,
            version=0,
            verdict=VERDICTS[mark],
        )
        for k, mark in enumerate(verdicts)
    )
    return Group(problem(number), responses)


def tally_of(groups: Sequence[Group]) -> Tally:
    tally = Tally()
    for each in groups:
        tally.add(each)
    return tally


class Sampler:
    """Questions 0, 1, 2, … of which `verdicts[number % len]` says how they are answered."""

    def __init__(self, *verdicts: str) -> None:
        self.verdicts, self.attempts, self.position = verdicts, [], 0

    def ask(self, problems: Sequence[Problem], attempt: int) -> tuple[list[Group], Tally]:
        self.attempts.append((attempt, len(problems)))
        groups = [group(int(p.id), self.verdicts[int(p.id) % len(self.verdicts)]) for p in problems]
        return groups, tally_of(groups)

    def take(self, num: int) -> list[Problem]:
        self.position += num
        return [problem(n) for n in range(self.position - num, self.position)]


def options(**changes: int | str) -> RolloutConfig:
    return RolloutConfig(**{"questions": 4, "questions_asked": 6, "max_asks": 3} | changes)


# collect


def test_mixed_groups_are_kept_in_the_order_of_the_questions() -> None:
    sampler = Sampler("++++", "+---", "----", "+-?-", "????", "+++?")
    groups, tally = collect(sampler.ask, sampler.take, options(questions=3))
    assert [int(g.problem.id) for g in groups] == [1, 3, 7]
    assert sampler.attempts == [(0, 6), (1, 6)]
    assert tally.num_groups == 12
    assert tally.num_mixed == 4  # one more than the batch holds


def test_it_stops_when_the_batch_is_full_and_cuts_what_is_over() -> None:
    sampler = Sampler("+-+-")
    groups, tally = collect(sampler.ask, sampler.take, options())
    assert [int(g.problem.id) for g in groups] == [0, 1, 2, 3]
    assert len(sampler.attempts) == 1
    assert tally.num_groups == 6
    assert sampler.position == 6  # surplus questions are spent, as in the official code


def test_a_batch_that_is_filled_by_the_last_ask_is_whole() -> None:
    sampler = Sampler("+-+-", "++++", "++++")  # two of six
    groups, _ = collect(sampler.ask, sampler.take, options(questions=6, on_short_batch="stop"))
    assert len(groups) == 6
    assert [attempt for attempt, _ in sampler.attempts] == [0, 1, 2]


def test_a_short_batch_is_trained_on() -> None:
    sampler = Sampler("+-+-", "++++", "----")
    groups, tally = collect(sampler.ask, sampler.take, options(questions=100))
    assert [int(g.problem.id) for g in groups] == [0, 3, 6, 9, 12, 15]
    assert len(sampler.attempts) == 3
    assert tally.num_groups == 18


def test_a_short_batch_stops_the_run_with_the_accuracies_seen() -> None:
    sampler = Sampler("+---", "++++", "----")
    with pytest.raises(RuntimeError) as raised:
        collect(sampler.ask, sampler.take, options(questions=100, on_short_batch="stop"))
    message = str(raised.value)
    assert "3 times 6 questions gave 6 groups" in message
    assert "wanted 100" in message
    assert "0.00: 6, 0.25: 6, 1.00: 6" in message
    assert "rollout.on_short_batch=train" in message


@pytest.mark.parametrize("on_short_batch", ["train", "stop"])
@pytest.mark.parametrize(
    ("verdicts", "histogram"),
    [
        (("----",), "0.00: 18"),
        (("++++", "----"), "0.00: 9, 1.00: 9"),
        (("????",), "0.00: 18"),
        (("++??",), "1.00: 18"),
    ],
)
def test_data_without_a_mixed_group_is_reported_not_trained_on(
    verdicts: tuple[str, ...], histogram: str, on_short_batch: str
) -> None:
    sampler = Sampler(*verdicts)
    with pytest.raises(RuntimeError, match="gave 0 groups with right and wrong") as raised:
        collect(sampler.ask, sampler.take, options(on_short_batch=on_short_batch))
    assert f": {histogram}." in str(raised.value)
    assert "on_short_batch" not in str(raised.value)  # would not help
    assert len(sampler.attempts) == 3


# Tally


def test_metrics_are_of_all_answers() -> None:
    groups = [group(0, "++--"), group(1, "+???"), group(2, "----")]
    expected = {
        "accuracy_all": 3 / 9,  # of the judged
        "unverifiable_rate": 3 / 12,
        "truncated_fraction": 6 / 12,
        "response_length_mean": (1 + 2 + 3 + 4) / 4,
        "verifier_timeouts": 0,
        "verifier_worker_deaths": 0,
        "groups_kept_fraction": 1 / 3,
    }
    assert tally_of(groups).metrics() == pytest.approx(expected)


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_merging_is_counting_everything_at_once(cut: int) -> None:
    groups = [group(0, "++--"), group(1, "+???"), group(2, "----")]
    merged = tally_of(groups[:cut])
    merged.merge(tally_of(groups[cut:]))
    assert merged == tally_of(groups)
    assert merged.metrics() == tally_of(groups).metrics()


def test_nothing_seen_is_no_division_by_zero() -> None:
    assert set(Tally().metrics().values()) == {0.0}
    assert Tally().histogram() == ""


# QuestionOrder


def ids(problems: Sequence[Problem]) -> list[int]:
    return [int(p.id) for p in problems]


def order(seed: int = 0, num: int = 10) -> QuestionOrder:
    return QuestionOrder([problem(n) for n in range(num)], seed)


def test_every_question_once_an_epoch_in_another_order() -> None:
    questions = order()
    epochs = [ids(questions.take(10)) for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(range(10)) not in epochs


def test_the_seed_decides() -> None:
    assert ids(order().take(25)) == ids(order().take(25))
    assert ids(order(seed=0).take(10)) != ids(order(seed=1).take(10))


@pytest.mark.parametrize("sizes", [[1] * 35, [35], [7] * 5, [25, 10]])
def test_batches_make_no_difference_even_beyond_an_epoch(sizes: list[int]) -> None:
    questions = order()
    taken = [number for size in sizes for number in ids(questions.take(size))]
    assert taken == ids(order().take(35))
    assert questions.position == 35


@pytest.mark.parametrize("position", [0, 3, 10, 17, 29])
def test_resuming_goes_on_as_if_nothing_had_been(position: int) -> None:
    whole = ids(order().take(40))
    resumed = order()
    resumed.position = position
    assert ids(resumed.take(40 - position)) == whole[position:]


def test_going_back_is_possible_too() -> None:
    questions = order()
    first = ids(questions.take(25))
    questions.position = 5
    assert ids(questions.take(20)) == first[5:]


# seeds


def test_every_question_has_a_seed_of_its_own_that_only_the_rollout_and_its_number_decide() -> None:
    seeds = [seed_of(rollout, number) for rollout in (0, 1, 2**64 - 1) for number in range(500)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert seeds[:500] == [seed_of(0, number) for number in range(500)]
    assert (seed_of(3, 5), seed_of(2**64 - 1, 0)) == (3746004709, 2458692877)  # on every machine


def test_light_to_import() -> None:
    """Neither the engine nor Megatron is needed to decide what to keep."""
    code = "import sys, megatron_nft.rollout.collect; print({'vllm', 'megatron'} & {*sys.modules})"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == "set()"
