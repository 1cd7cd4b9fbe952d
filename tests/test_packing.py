"""Sequences dealt to ranks and micro-batches, and packed into rows, against examples by hand."""

import math

import numpy as np
import pytest
import torch

from megatron_nft.policy.packing import MicroBatch, Sequence, deal, micro_batch, sequences_of
from megatron_nft.rollout.groups import Group, Problem, Response, Verdict

CPU = torch.device("cpu")


def _lengths(num: int, longest: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, longest + 1, num).tolist()


DEALS = {  # lengths, ranks, budget
    "one rank": (_lengths(50, 100), 1, 300),
    "many ranks": (_lengths(200, 100), 8, 300),
    "budget below many lengths": (_lengths(40, 100), 4, 50),
    "budget of one token": (_lengths(20, 10), 2, 1),
    "everything fits": (_lengths(20, 10), 2, 10_000),
    "fewer sequences than ranks": ([7, 3], 4, 100),
    "one sequence": ([9], 2, 4),
    "equal lengths": ([8] * 24, 3, 16),
    "a few giants": ([1000, 990, *_lengths(30, 10)], 2, 64),
}


def _loads(lengths: list[int], bins: list[list[int]]) -> list[int]:
    return [sum(lengths[i] for i in indices) for indices in bins]


@pytest.mark.parametrize("name", DEALS)
def test_every_sequence_is_dealt_once_within_the_budget(name: str) -> None:
    lengths, num_ranks, budget = DEALS[name]
    ranks = deal(lengths, num_ranks, budget)
    assert len(ranks) == num_ranks
    assert len({len(bins) for bins in ranks}) == 1, "ranks differ in micro-batches"
    bins = [indices for rank in ranks for indices in rank]
    assert sorted(i for indices in bins for i in indices) == list(range(len(lengths)))
    for indices, load in zip(bins, _loads(lengths, bins), strict=True):
        assert load <= budget or len(indices) == 1


@pytest.mark.parametrize("name", DEALS)
def test_micro_batches_differ_by_at_most_the_longest_sequence(name: str) -> None:
    """As longest-first into the emptiest bin guarantees, whatever the lengths."""
    lengths, num_ranks, budget = DEALS[name]
    loads = _loads(
        lengths, [indices for rank in deal(lengths, num_ranks, budget) for indices in rank]
    )
    assert max(loads) - min(loads) <= max(lengths)


@pytest.mark.parametrize("name", ["one rank", "many ranks", "everything fits"])
def test_no_more_micro_batches_than_the_budget_asks_for(name: str) -> None:
    """A bin is at most mean + longest, so that this many are enough."""
    lengths, num_ranks, budget = DEALS[name]
    enough = math.ceil(sum(lengths) / (num_ranks * (budget - max(lengths))))
    assert len(deal(lengths, num_ranks, budget)[0]) <= enough


@pytest.mark.parametrize("seed", range(5))
def test_ranks_of_a_real_minibatch_are_balanced_within_one_percent(seed: int) -> None:
    lengths = _lengths(512, 4096, seed)
    loads = [sum(_loads(lengths, bins)) for bins in deal(lengths, 8, 16384)]
    assert max(loads) - min(loads) <= 0.01 * sum(loads) / 8


def test_a_sequence_beyond_the_budget_is_alone() -> None:
    ranks = deal([5, 300, 5, 5], 1, 100)
    assert [1] in ranks[0]


def test_fewer_sequences_than_ranks_leave_empty_micro_batches() -> None:
    assert deal([7, 3], 4, 100) == [[[0]], [[1]], [[]], [[]]]


def test_dealing_is_deterministic() -> None:
    lengths, num_ranks, budget = DEALS["many ranks"]
    assert deal(lengths, num_ranks, budget) == deal(np.array(lengths), num_ranks, budget)


def _sequence(prompt: list[int], response: list[int], correct: bool, accuracy: float) -> Sequence:
    old_logp = -np.array(response, np.float32) / 10
    return Sequence(
        prompt=np.array(prompt, np.int32),
        response=np.array(response, np.int32),
        logp=old_logp - 1,
        old_logp=old_logp,
        correct=correct,
        group_accuracy=accuracy,
    )


SEQUENCES = [
    _sequence([11, 12, 13], [21, 22], correct=True, accuracy=0.25),
    _sequence([31], [41, 42, 43], correct=False, accuracy=0.75),
    _sequence([51, 52], [61], correct=True, accuracy=0.5),
]
ROW = [11, 12, 13, 21, 31, 41, 42, 51, 52]  # no answer's last token is fed


def _check_targets(packed: MicroBatch) -> None:
    """What padding must not change."""
    assert packed.predictors.tolist() == [2, 3, 4, 5, 6, 8]
    assert packed.targets.tolist() == [21, 22, 41, 42, 43, 61]
    assert packed.token_weights.tolist() == [0.5, 0.5, 0.125, 0.125, 0.125, 2.0]
    batch = packed.batch
    np.testing.assert_allclose(batch.old_logp, [-2.1, -2.2, -4.1, -4.2, -4.3, -6.1], rtol=1e-6)
    assert batch.correct.tolist() == [1, 1, 0, 0, 0, 1]
    assert batch.group_accuracy.tolist() == [0.25, 0.25, 0.75, 0.75, 0.75, 0.5]
    assert batch.sequence_ids.tolist() == [0, 0, 1, 1, 1, 2]
    assert batch.num_sequences == 3


def test_a_row_by_hand() -> None:
    packed = micro_batch(SEQUENCES, [0.5, 0.125, 2.0], CPU)
    assert packed.tokens.tolist() == [ROW]
    assert packed.row.cu_seqlens_q.diff().tolist() == [4, 3, 2]
    assert packed.row.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    _check_targets(packed)


def test_a_row_is_padded_by_a_sequence_that_predicts_nothing() -> None:
    packed = micro_batch(SEQUENCES, [0.5, 0.125, 2.0], CPU, multiple=4)
    assert packed.tokens.tolist() == [[*ROW, 0, 0, 0]]
    assert packed.row.cu_seqlens_q.diff().tolist() == [4, 3, 2, 3]
    _check_targets(packed)


def test_a_row_of_the_right_length_is_not_padded() -> None:
    packed = micro_batch(SEQUENCES, [0.5, 0.125, 2.0], CPU, multiple=3)
    assert packed.tokens.tolist() == [ROW]
    _check_targets(packed)


@pytest.mark.parametrize("sequences", [SEQUENCES, []])
def test_dtypes(sequences: list[Sequence]) -> None:
    packed = micro_batch(sequences, [1.0] * len(sequences), CPU)
    batch = packed.batch
    for ids in (packed.tokens, packed.predictors, packed.targets, batch.sequence_ids):
        assert ids.dtype == torch.int64
    for values in (packed.token_weights, batch.old_logp, batch.correct, batch.group_accuracy):
        assert values.dtype == torch.float32


@pytest.mark.parametrize("multiple", [1, 4])
def test_no_sequences_become_a_row_of_padding(multiple: int) -> None:
    packed = micro_batch([], [], CPU, multiple)
    assert packed.tokens.tolist() == [[0] * multiple]
    assert packed.row.cu_seqlens_q.diff().tolist() == [multiple]
    assert packed.batch.num_sequences == 0
    batch = packed.batch
    for values in (packed.predictors, packed.targets, packed.token_weights, batch.old_logp):
        assert values.shape == (0,)
    for values in (batch.correct, batch.group_accuracy, batch.sequence_ids):
        assert values.shape == (0,)


def _response(tokens: list[int], verdict: Verdict | None) -> Response:
    logp = -np.array(tokens, np.float32)
    return Response(np.array(tokens, np.int32), logp, "stop", "", verdict)


def test_only_judged_answers_become_sequences() -> None:
    problem = Problem("q", np.array([1, 2], np.int32), "7", "toy")
    responses = (
        _response([3, 4], Verdict.CORRECT),
        _response([5], Verdict.UNVERIFIABLE),
        _response([6], Verdict.WRONG),
        _response([7], None),
        _response([], Verdict.WRONG),
        _response([8], Verdict.WRONG),
    )
    found = sequences_of([Group(problem, responses, weights_version=0)])
    assert [s.response.tolist() for s in found] == [[3, 4], [6], [8]]
    assert [s.correct for s in found] == [True, False, False]
    assert {s.group_accuracy for s in found} == {0.25}  # 1 of the 4 judged
    assert found[0].logp.tolist() == found[0].old_logp.tolist() == [-3, -4]
    assert [s.num_tokens for s in found] == [3, 2, 2]
