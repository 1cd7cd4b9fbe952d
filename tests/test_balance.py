"""Sequences dealt to ranks and micro-batches: counts, budgets and balance, against plain sums."""

import math
from collections.abc import Iterator

import numpy as np
import pytest

from megatron_nft.policy.balance import deal

QUADRATIC_32B = 64 * 5120 / 31e9  # Qwen2.5-32B: layers · heads · head_dim / parameters


def _lengths(num: int, longest: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, longest + 1, num).tolist()


def _log_normal(num: int, sigma: float, seed: int) -> list[int]:
    """Answers as long as a reasoning model's: 3,000 tokens on average, cut at 16,384."""
    drawn = np.random.default_rng(seed).lognormal(np.log(3000) - sigma**2 / 2, sigma, num)
    return np.clip(np.rint(drawn), 1, 16384).astype(int).tolist()


DEALS = {  # lengths, ranks, budget
    "one rank": (_lengths(50, 100), 1, 300),
    "many ranks": (_lengths(200, 100), 8, 300),
    "budget below many lengths": (_lengths(40, 100), 4, 50),
    "budget of one token": (_lengths(20, 10), 2, 1),
    "everything fits": (_lengths(20, 10), 2, 10_000),
    "fewer sequences than ranks": ([7, 3], 4, 100),
    "one sequence": ([9], 2, 4),
    "no sequences": ([], 3, 4),
    "equal lengths": ([8] * 24, 3, 16),
    "a few giants": ([1000, 990, *_lengths(30, 10)], 2, 64),
}
ROLLOUTS = [(sigma, seed) for sigma in (0.6, 0.7, 0.8, 0.9, 1.0) for seed in range(2)]


def _flat(ranks: list[list[list[int]]]) -> list[list[int]]:
    return [indices for bins in ranks for indices in bins]


def _loads(lengths: list[int], bins: list[list[int]]) -> list[int]:
    return [sum(lengths[i] for i in indices) for indices in bins]


def _works(lengths: list[int], ranks: list[list[list[int]]], quadratic: float) -> np.ndarray:
    """Work of each micro-batch, [rank, micro-batch]."""
    work = [n + quadratic * n**2 for n in lengths]
    return np.array([[sum(work[i] for i in indices) for indices in bins] for bins in ranks])


def _imbalance(works: np.ndarray) -> float:
    totals = works.sum(1)
    return totals.max() / totals.mean() - 1


def _num_first_fit(lengths: list[int], budget: int) -> int:
    """Bins of first-fit, in the order given."""
    loads: list[int] = []
    for n in lengths:
        fitting = (b for b, load in enumerate(loads) if load + n <= budget)
        number = next(fitting, len(loads))
        loads[number : number + 1] = [sum(loads[number : number + 1]) + n]
    return len(loads)


def _check(lengths: list[int], ranks: list[list[list[int]]], budget: int, multiple: int) -> None:
    """What holds of every deal."""
    counts = {len(bins) for bins in ranks}
    assert len(counts) == 1, "ranks differ in micro-batches"
    assert counts.pop() % multiple == 0
    bins = _flat(ranks)
    assert bins
    assert sorted(i for indices in bins for i in indices) == list(range(len(lengths)))
    # Best-fit opens a bin only where all others exceed the capacity less the longest sequence, so
    # that a capacity of mean + longest is always enough.
    even = math.ceil(sum(lengths) / len(bins) + max(lengths, default=0))
    for indices, load in zip(bins, _loads(lengths, bins), strict=True):
        assert load <= min(budget, even) or len(indices) == 1


@pytest.mark.parametrize("multiple", [1, 3])
@pytest.mark.parametrize("name", DEALS)
def test_every_sequence_is_dealt_once_within_the_budget(name: str, multiple: int) -> None:
    lengths, num_ranks, budget = DEALS[name]
    ranks = deal(lengths, num_ranks, budget, multiple=multiple)
    assert len(ranks) == num_ranks
    _check(lengths, ranks, budget, multiple)


def _random_deals() -> Iterator[tuple[list[int], int, int, float, int]]:
    random = np.random.default_rng(0)
    for _ in range(300):
        budget, longest = random.integers(1, 200, 2)
        lengths = random.integers(1, longest + 1, random.integers(0, 60)).tolist()
        quadratic = random.choice([0.0, 1e-3, 1.0])
        yield lengths, random.integers(1, 9), int(budget), quadratic, random.integers(1, 5)


def test_random_deals_hold_what_every_deal_holds() -> None:
    for lengths, num_ranks, budget, quadratic, multiple in _random_deals():
        ranks = deal(lengths, num_ranks, budget, quadratic=quadratic, multiple=multiple)
        assert len(ranks) == num_ranks
        _check(lengths, ranks, budget, multiple)
        works = _works(lengths, ranks, quadratic)
        assert (np.diff(works, axis=1) <= 1e-9 * works.max()).all(), "not heaviest first"


def test_random_deals_need_no_more_micro_batches_than_first_fit() -> None:
    for lengths, num_ranks, budget, quadratic, multiple in _random_deals():
        ranks = deal(lengths, num_ranks, budget, quadratic=quadratic, multiple=multiple)
        step = num_ranks * multiple
        first_fit = max(1, math.ceil(_num_first_fit(lengths, budget) / step)) * step
        assert len(_flat(ranks)) <= first_fit, (lengths, budget)


@pytest.mark.parametrize(
    "name", ["one rank", "many ranks", "everything fits", "no sequences", "equal lengths"]
)
def test_as_few_micro_batches_as_the_tokens_need(name: str) -> None:
    lengths, num_ranks, budget = DEALS[name]
    needed = max(1, math.ceil(sum(lengths) / (num_ranks * budget)))
    assert len(deal(lengths, num_ranks, budget)[0]) == needed


def test_the_count_is_rounded_up_to_the_multiple() -> None:
    lengths = [8] * 24  # 12 bins of 16, 4 a rank
    for multiple, expected in ((1, 4), (2, 4), (3, 6), (4, 4), (5, 5)):
        assert {len(bins) for bins in deal(lengths, 3, 16, multiple=multiple)} == {expected}


@pytest.mark.parametrize("multiple", [1, 2])
def test_no_sequences_become_empty_micro_batches(multiple: int) -> None:
    assert deal([], 2, 8, multiple=multiple) == [[[]] * multiple] * 2


def test_a_sequence_beyond_the_budget_is_alone() -> None:
    assert deal([5, 300, 5, 5], 1, 100) == [[[1], [0, 2, 3]]]


def test_fewer_sequences_than_ranks_leave_empty_micro_batches() -> None:
    assert deal([7, 3], 4, 100) == [[[0]], [[1]], [[]], [[]]]


def test_ranks_balance_the_square_of_the_lengths() -> None:
    """By tokens 8 is worth four times 2, by its square 16 times: it is left alone."""
    lengths = [8, 2, 2, 2, 2, 2, 2, 2, 2]
    assert [len(bins[0]) for bins in deal(lengths, 2, 64)] == [3, 6]
    assert [len(bins[0]) for bins in deal(lengths, 2, 64, quadratic=1e6)] == [1, 8]


def test_levelling_ranks_keeps_micro_batches_short_where_the_budget_is_ample() -> None:
    """Three sequences would level the ranks better, in a micro-batch beyond mean + longest."""
    lengths = [28, 15, 15, 28, 14, 13]
    _check(lengths, deal(lengths, 3, 87, quadratic=1.0, multiple=3), 87, 3)


def test_the_deal_depends_on_the_lengths_alone() -> None:
    lengths, num_ranks, budget = DEALS["many ranks"]
    ranks = deal(lengths, num_ranks, budget, quadratic=1e-3)
    for again in (lengths, tuple(lengths), np.array(lengths), np.array(lengths, np.int32)):
        assert deal(again, num_ranks, budget, quadratic=1e-3) == ranks
    assert {type(i) for indices in _flat(ranks) for i in indices} == {int}


@pytest.mark.parametrize("quadratic", [0.0, QUADRATIC_32B])
@pytest.mark.parametrize("seed", range(5))
def test_ranks_of_a_real_minibatch_are_balanced(seed: int, quadratic: float) -> None:
    lengths = _lengths(512, 4096, seed)
    works = _works(lengths, deal(lengths, 8, 16384, quadratic=quadratic), quadratic).sum(1)
    assert works.max() - works.min() <= 0.002 * works.mean()


@pytest.mark.parametrize(("sigma", "seed"), ROLLOUTS)
def test_a_rollout_fills_98_percent_and_balances(sigma: float, seed: int) -> None:
    """8,192 sequences on the 32B recipe's 16 ranks and 16,384 tokens."""
    lengths = _log_normal(8192, sigma, seed)
    ranks = deal(lengths, 16, 16384, quadratic=QUADRATIC_32B)
    assert sum(lengths) >= 0.98 * len(_flat(ranks)) * 16384
    works = _works(lengths, ranks, QUADRATIC_32B)
    assert _imbalance(works) <= 0.0004
    # All ranks wait for the heaviest micro-batch of each index.
    assert works.max(0).sum() <= 1.0012 * works.sum(1).mean()


@pytest.mark.parametrize(("sigma", "seed"), ROLLOUTS)
def test_a_minibatch_is_as_full_as_whole_micro_batches_allow(sigma: float, seed: int) -> None:
    """512 sequences are about 6 micro-batches a rank, so that one more or less is 17 %."""
    lengths = _log_normal(512, sigma, seed)
    ranks = deal(lengths, 16, 16384, quadratic=QUADRATIC_32B)
    assert len(ranks[0]) == math.ceil(sum(lengths) / (16 * 16384))
    works = _works(lengths, ranks, QUADRATIC_32B)
    assert _imbalance(works) <= 0.002
    assert works.max(0).sum() <= 1.04 * works.sum(1).mean()
