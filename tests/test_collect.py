"""Dynamic sampling: which groups are kept, when it stops, and what was seen."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_nft.config import RolloutConfig
from megatron_nft.notice import Interrupted
from megatron_nft.rollout.collect import Asked, Collector, ask
from megatron_nft.rollout.colocated import _share
from megatron_nft.rollout.engine import Answers, Sampling, seed_of
from megatron_nft.rollout.groups import Group, Problem, Response, Verdict
from megatron_nft.rollout.questions import Experience, QuestionOrder
from megatron_nft.rollout.tally import Tally

K = 4
VERDICTS = {"+": Verdict.CORRECT, "-": Verdict.WRONG, "?": Verdict.UNVERIFIABLE}


def problem(number: int) -> Problem:
    return Problem(str(number), np.array([number], np.int32), "1", "toy")


def group(number: int, verdicts: str, version: int = 0) -> Group:
    """A group from `+`, `-` and `?`; the k-th answer has k + 1 tokens, wrong ones were cut off."""
    responses = tuple(
        Response(
            tokens=np.zeros(k + 1, np.int32),
            logp=np.zeros(k + 1, np.float32),
            finish="length" if mark == "-" else "stop",
            text="",
            seed=k,
            version=version,
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
    """Questions 0, 1, 2, … of which `verdicts[number % len]` says how they are answered.

    Of every ask the `cut` last are not answered.
    """

    def __init__(self, *verdicts: str, cut: int = 0, version: int = 0, **changes: Any) -> None:
        self.verdicts, self.asked, self.num_cut, self.version = verdicts, [], cut, version
        problems = [problem(n) for n in range(10_000)]
        self.collector = Collector(InOrder(problems, seed=0), options(**changes))

    def ask(self, problems: Sequence[Problem], expected: Sequence[float], attempt: int) -> Asked:
        self.asked.append(ids(problems))
        assert len(expected) == len(problems)
        assert attempt == len(self.asked) - 1
        answered = problems[: len(problems) - self.num_cut]
        groups = [
            group(int(p.id), self.verdicts[int(p.id) % len(self.verdicts)], self.version)
            for p in answered
        ]
        mixed = [each for each in groups if each.is_mixed]
        return Asked(mixed, tally_of(groups), list(problems[len(answered) :]))

    def batch(self, oldest: int = 0) -> tuple[list[int], Tally]:
        self.asked = []
        batch = self.collector.batch(self.ask, oldest)
        return ids([each.problem for each in batch.groups]), batch.tally


class InOrder(QuestionOrder):
    """Questions as they come."""

    def _at(self, position: int) -> Problem:
        return self._problems[position % len(self._problems)]


def options(**changes: Any) -> RolloutConfig:
    return RolloutConfig(**{"questions": 4, "questions_asked": 6, "max_asks": 3} | changes)


def ids(problems: Sequence[Problem]) -> list[int]:
    return [int(p.id) for p in problems]


# Collector


def test_mixed_groups_are_kept_in_the_order_of_the_questions() -> None:
    sampler = Sampler("++++", "+---", "----", "+-?-", "????", "+++?", questions=3)
    groups, tally = sampler.batch()
    assert groups == [1, 3, 7]
    assert sampler.asked == [[*range(6)], [*range(6, 12)]]
    assert tally.num_groups == 12
    assert tally.num_mixed == 4  # one more than the batch holds


def test_it_stops_when_the_batch_is_full() -> None:
    sampler = Sampler("+-+-")
    groups, tally = sampler.batch()
    assert groups == [0, 1, 2, 3]
    assert len(sampler.asked) == 1
    assert tally.num_groups == 6


def test_surplus_trains_the_next_batch_if_it_is_not_too_old() -> None:
    sampler = Sampler("+-+-", version=5)
    assert sampler.batch(oldest=4)[0] == [0, 1, 2, 3]
    groups, tally = sampler.batch(oldest=5)
    assert groups == [4, 5, 6, 7]
    assert tally.num_groups == 6  # of this rollout's questions: 6 to 11
    assert ids([g.problem for g in sampler.collector.surplus]) == [8, 9, 10, 11]
    sampler.version = 6
    assert sampler.batch(oldest=6)[0] == [12, 13, 14, 15]  # 8 to 11 are of version 5


def test_a_full_batch_of_surplus_asks_nothing() -> None:
    sampler = Sampler("+-+-", questions_asked=12)
    sampler.batch()
    groups, tally = sampler.batch()
    assert (groups, sampler.asked, tally.num_groups) == ([4, 5, 6, 7], [], 0)


def test_surplus_can_be_thrown_away_as_the_official_code_does() -> None:
    sampler = Sampler("+-+-", keep_surplus=False)
    assert [sampler.batch()[0] for _ in range(2)] == [[0, 1, 2, 3], [6, 7, 8, 9]]


def test_a_batch_that_is_given_up_is_asked_again_from_its_beginning() -> None:
    """Its second ask is interrupted: surplus, questions and what was cut off are as before."""
    sampler = Sampler("+-+-", cut=1, questions_asked=6)
    sampler.batch()
    collector, ask_ = sampler.collector, sampler.ask
    before = collector._order.position, ids([g.problem for g in collector.surplus]), collector.cut

    def interrupted(problems: Sequence[Problem], expected: Sequence[float], attempt: int) -> Asked:
        if attempt:
            raise Interrupted
        return replace(ask_(problems, expected, attempt), mixed=[])

    sampler.asked = []
    with pytest.raises(Interrupted):
        collector.batch(interrupted, 0)
    after = collector._order.position, ids([g.problem for g in collector.surplus]), collector.cut
    assert after == before
    assert len(sampler.asked) == 1


def test_questions_that_were_cut_off_are_asked_first_the_next_time() -> None:
    sampler = Sampler("+-+-", cut=2, questions=8, keep_surplus=False)
    assert sampler.batch()[0] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert sampler.asked == [[0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9]]
    assert ids(sampler.collector.cut) == [8, 9]
    sampler.num_cut = 0
    assert sampler.batch()[0] == [8, 9, *range(10, 16)]
    assert sampler.collector.cut == []


def test_what_an_engine_did_not_answer_was_cut_off() -> None:
    class Hasty:
        is_collective = False

        def generate(self, problems: Sequence[Problem], *_: object) -> Answers:
            return [(i, group(i, "+-").responses) for i in (1, 2)]

    asked = ask(Hasty(), None, [problem(n) for n in range(4)], [1.0] * 4, Sampling(2, 1, 1, 9, 0))
    assert ids(asked.cut) == [0, 3]
    assert asked.tally.num_cut == 2


def test_no_question_is_lost_where_more_were_cut_off_than_are_asked_next() -> None:
    sampler = Sampler("+-+-", cut=5, questions=2, keep_surplus=False)
    assert sampler.batch()[0] == [0, 1]  # 1 to 5 were cut off, then 2 to 6 of 1 to 6
    assert ids(sampler.collector.cut) == [2, 3, 4, 5, 6]
    sampler.collector._options = options(questions=2, questions_asked=3, keep_surplus=False)
    sampler.num_cut = 0
    assert sampler.batch()[0] == [2, 3]
    assert ids(sampler.collector.cut) == [5, 6]
    assert sampler.batch()[0] == [5, 6]
    assert sampler.asked == [[5, 6, 7]]


def test_a_batch_that_is_filled_by_the_last_ask_is_whole() -> None:
    sampler = Sampler("+-+-", "++++", "++++", questions=6, on_short_batch="stop")  # two of six
    assert len(sampler.batch()[0]) == 6
    assert len(sampler.asked) == 3


def test_a_short_batch_is_trained_on() -> None:
    sampler = Sampler("+-+-", "++++", "----", questions=100)
    groups, tally = sampler.batch()
    assert groups == [0, 3, 6, 9, 12, 15]
    assert len(sampler.asked) == 3
    assert tally.num_groups == 18


def test_a_short_batch_stops_the_run_with_the_accuracies_seen() -> None:
    sampler = Sampler("+---", "++++", "----", questions=100, on_short_batch="stop")
    with pytest.raises(RuntimeError) as raised:
        sampler.batch()
    message = str(raised.value)
    assert "3 times asked, 18 questions gave 6 groups" in message
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
    """Row 17 of field_failures: the accuracies seen are told, and what may be done."""
    sampler = Sampler(*verdicts, on_short_batch=on_short_batch)
    with pytest.raises(RuntimeError, match="gave 0 groups with right and wrong") as raised:
        sampler.batch()
    assert f": {histogram}." in str(raised.value)
    assert "on_short_batch" not in str(raised.value)  # would not help
    assert len(sampler.asked) == 3


@pytest.mark.parametrize(("verdicts", "share"), [(("+-+-", "++++"), 1 / 2), (("+---",), 1.0)])
def test_as_many_are_asked_as_the_measured_share_needs(
    verdicts: tuple[str, ...], share: float
) -> None:
    sampler = Sampler(*verdicts, questions=200, questions_asked=0, keep_surplus=False)
    first = sampler.batch()[1].num_groups
    assert 400 <= first <= 430  # nothing is known yet: half of them may be mixed
    later = [sampler.batch()[1].num_groups for _ in range(3)]
    assert all(200 / share <= num <= 1.12 * 200 / share for num in later)
    assert len(sampler.asked) == 1


def test_never_more_at_once_than_the_official_code_asks() -> None:
    sampler = Sampler("+-+-", *(["++++"] * 19), questions=10, questions_asked=0, max_asks=10)
    sampler.batch()
    assert max(map(len, sampler.asked)) == 30


# Experience


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7, 0.95])
def test_five_of_six_batches_are_filled_at_once(share: float) -> None:
    rng = np.random.default_rng(0)
    learned = Experience(asked=1e6, mixed=share * 1e6)
    num = learned.num_to_ask(512, Tally(), most=10**9)
    filled = (rng.binomial(num, share, 2000) >= 512).mean()
    assert 0.80 <= filled <= 0.92  # one standard deviation: 84 %, and whole questions


def test_expected_lengths_are_those_of_earlier_answers_or_their_mean() -> None:
    learned = Experience()
    assert learned.expected_tokens([problem(0)]) == [1.0]
    learned.add(tally_of([group(0, "+-"), group(1, "+-+-")]))  # 1 to 2 and 1 to 4 tokens
    assert learned.expected_tokens([problem(n) for n in (0, 1, 2)]) == [1.5, 2.5, 2.0]


def test_old_rollouts_fade() -> None:
    learned = Experience()
    learned.add(tally_of([group(n, "++++") for n in range(64)]))
    for _ in range(8):
        learned.add(tally_of([group(n, "+-+-") for n in range(64)]))
    assert learned.num_to_ask(100, Tally(), most=10**9) == pytest.approx(100, abs=3)


def test_the_longest_are_dealt_first_and_evenly() -> None:
    expected = [1.0, 7.0, 3.0, 5.0, 5.0, 2.0]
    shares = [_share(expected, number, 2) for number in range(2)]
    assert shares == [[1, 2, 5], [3, 4, 0]]  # 12 and 11 tokens
    assert _share([1.0] * 6, 1, 3) == [1, 4]


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
        "questions_cut": 0,
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
    assert set(Tally().metrics().values()) == {0}
    assert "accuracy_all" not in Tally().metrics()  # 0 would look like one
    assert Tally().histogram() == ""


# QuestionOrder


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
