"""Sequences packed into rows, against examples by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_nft.config import ObjectiveConfig
from megatron_nft.objectives import dapo
from megatron_nft.policy.balance import deal
from megatron_nft.policy.packing import (
    MicroBatch,
    RowLayout,
    Sequence,
    micro_batch,
    sequences_of,
)
from megatron_nft.rollout.groups import Group, Problem, Response, Verdict

CPU = torch.device("cpu")


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
    assert packed.predicted.tolist() == [0, 1, 2, 3, 4, 5]
    assert packed.targets.tolist() == [21, 22, 41, 42, 43, 61]
    assert packed.token_weights.tolist() == [0.5, 0.5, 0.125, 0.125, 0.125, 2.0]
    batch = packed.batch
    np.testing.assert_allclose(batch.old_logp, [-2.1, -2.2, -4.1, -4.2, -4.3, -6.1], rtol=1e-6)
    assert batch.correct.tolist() == [1, 1, 0, 0, 0, 1]
    assert batch.group_accuracy.tolist() == [0.25, 0.25, 0.75, 0.75, 0.75, 0.5]
    assert batch.sequence_ids.tolist() == [0, 0, 1, 1, 1, 2]
    assert batch.num_sequences == 3


def test_a_row_by_hand() -> None:
    packed = micro_batch(SEQUENCES, [0.5, 0.125, 2.0], CPU, RowLayout())
    assert packed.tokens.tolist() == [ROW]
    assert packed.row.cu_seqlens_q.diff().tolist() == [4, 3, 2]
    assert packed.row.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    _check_targets(packed)


def test_a_row_is_padded_by_a_sequence_that_predicts_nothing() -> None:
    packed = micro_batch(SEQUENCES, [0.5, 0.125, 2.0], CPU, RowLayout(4))
    assert packed.tokens.tolist() == [[*ROW, 0, 0, 0]]
    assert packed.row.cu_seqlens_q.diff().tolist() == [4, 3, 2, 3]
    _check_targets(packed)


def test_a_row_of_the_right_length_is_not_padded() -> None:
    packed = micro_batch(SEQUENCES, [0.5, 0.125, 2.0], CPU, RowLayout(3))
    assert packed.tokens.tolist() == [ROW]
    _check_targets(packed)


def test_a_row_over_two_context_parallel_ranks_by_hand() -> None:
    """Every sequence padded to a multiple of four; the first and last quarter to the first rank."""
    first, second = (
        micro_batch(SEQUENCES, [0.5, 0.125, 2.0], CPU, RowLayout(4, rank, 2)) for rank in (0, 1)
    )
    #    whole row: 11 12 13 21 | 31 41 42 0 | 51 52 0 0
    assert first.tokens.tolist() == [[11, 21, 31, 0, 51, 0]]
    assert second.tokens.tolist() == [[12, 13, 41, 42, 52, 0]]
    assert first.row.positions.tolist() == [0, 3, 0, 3, 0, 3]
    assert second.row.positions.tolist() == [1, 2, 1, 2, 1, 2]
    assert first.predictors.tolist() == [1, 2]
    assert first.predicted.tolist() == [1, 2]
    assert first.targets.tolist() == [22, 41]
    assert second.predictors.tolist() == [1, 2, 3, 4]
    assert second.predicted.tolist() == [0, 3, 4, 5]
    assert second.targets.tolist() == [21, 42, 43, 61]
    for packed in (first, second):
        assert packed.row.cu_seqlens_q.diff().tolist() == [4, 4, 4]  # of the whole row
        assert packed.token_weights.tolist() == [0.5, 0.5, 0.125, 0.125, 0.125, 2.0]
        assert packed.batch.sequence_ids.tolist() == [0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize(("rank", "num_ranks"), [(0, 1), (0, 2), (1, 2), (3, 4)])
@pytest.mark.parametrize("sequences", [SEQUENCES, SEQUENCES[:1], []])
def test_spans_are_the_rows_length(sequences: list[Sequence], rank: int, num_ranks: int) -> None:
    layout = RowLayout(16, rank, num_ranks)
    spans = layout.spans([s.num_tokens for s in sequences])
    packed = micro_batch(sequences, [1.0] * len(sequences), CPU, layout)
    assert packed.tokens.shape == (1, sum(spans) // num_ranks)
    assert sum(spans) % 16 == 0
    assert not any(span % layout.sequence_multiple for span in spans)


@pytest.mark.parametrize("sequences", [SEQUENCES, []])
def test_dtypes(sequences: list[Sequence]) -> None:
    packed = micro_batch(sequences, [1.0] * len(sequences), CPU, RowLayout())
    batch = packed.batch
    for ids in (packed.tokens, packed.predictors, packed.targets, batch.sequence_ids):
        assert ids.dtype == torch.int64
    for values in (packed.token_weights, batch.old_logp, batch.correct, batch.group_accuracy):
        assert values.dtype == torch.float32


@pytest.mark.parametrize("multiple", [1, 4])
def test_no_sequences_become_a_row_of_padding(multiple: int) -> None:
    packed = micro_batch([], [], CPU, RowLayout(multiple))
    assert packed.tokens.tolist() == [[0] * multiple]
    assert packed.row.cu_seqlens_q.diff().tolist() == [multiple]
    assert packed.batch.num_sequences == 0
    batch = packed.batch
    for values in (packed.predictors, packed.targets, packed.token_weights, batch.old_logp):
        assert values.shape == (0,)
    for values in (batch.correct, batch.group_accuracy, batch.sequence_ids):
        assert values.shape == (0,)


def test_a_token_is_weighted_by_its_own_importance_and_its_sequence() -> None:
    first, *others = SEQUENCES
    weighted = [replace(first, importance=np.array([0.5, 3.0], np.float32)), *others]
    packed = micro_batch(weighted, [0.5, 0.125, 2.0], CPU, RowLayout())
    assert packed.token_weights.tolist() == [0.25, 1.5, 0.125, 0.125, 0.125, 2.0]
    assert packed.token_weights.dtype == torch.float32


def test_an_importance_of_another_length_is_no_importance() -> None:
    first, *others = SEQUENCES
    with pytest.raises(RuntimeError, match="must match"):
        micro_batch([replace(first, importance=np.ones(3)), *others], [1.0] * 3, CPU, RowLayout())


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_group_s_accuracy_is_that_of_all_its_answers_wherever_they_go(num_ranks: int) -> None:
    """Row 18 of field_failures: it was wrong once a group was sharded or reordered."""
    rng = np.random.default_rng(0)
    groups = []
    for number in range(6):
        verdicts = [Verdict.CORRECT] * (number + 1) + [Verdict.WRONG] * (7 - number)
        answers = tuple(
            _response([number] * int(rng.integers(1, 30)), verdict)
            for verdict in rng.permutation(np.array(verdicts, object))
        )
        groups.append(Group(Problem(str(number), np.array([number], np.int32), "7", "t"), answers))
    sequences = sequences_of(groups)
    lengths = [s.num_tokens for s in sequences]
    seen = np.zeros(6, int)
    for rank in deal(lengths, num_ranks, budget=64):
        for indices in rank:
            chosen = [sequences[i] for i in indices]
            packed = micro_batch(chosen, [1.0] * len(chosen), CPU, RowLayout())
            numbers = packed.targets.tolist()  # every token of an answer is its group's number
            assert packed.batch.group_accuracy.tolist() == [(n + 1) / 8 for n in numbers]
            np.add.at(seen, [s.response[0] for s in chosen], 1)
    assert seen.tolist() == [8] * 6


def _response(tokens: list[int], verdict: Verdict | None, version: int = 0) -> Response:
    logp = -np.array(tokens, np.float32)
    return Response(np.array(tokens, np.int32), logp, "stop", "", 0, version, verdict)


def test_only_judged_answers_become_sequences() -> None:
    problem = Problem("q", np.array([1, 2], np.int32), "7", "toy")
    responses = (
        _response([3, 4], Verdict.CORRECT, version=7),
        _response([5], Verdict.UNVERIFIABLE),
        _response([6], Verdict.WRONG),
        _response([7], None),
        _response([], Verdict.WRONG),
        _response([8], Verdict.WRONG),
    )
    found = sequences_of([Group(problem, responses)])
    assert [s.response.tolist() for s in found] == [[3, 4], [6], [8]]
    assert [s.correct for s in found] == [True, False, False]
    assert {s.group_accuracy for s in found} == {0.25}  # 1 of the 4 judged
    assert found[0].logp.tolist() == found[0].old_logp.tolist() == [-3, -4]
    assert [s.num_tokens for s in found] == [3, 2, 2]
    assert [s.version for s in found] == [7, 0, 0]
    assert all(s.importance is None for s in found)
    assert all(s.advantage is None for s in found)


def test_overlong_answers_lose_some_of_their_reward() -> None:
    """DAPO's soft punishment: ±1, less the share of the buffer that is used; by hand."""
    lengths = (4, 8, 9, 12, 12)
    verdicts = [Verdict.CORRECT, Verdict.CORRECT, Verdict.CORRECT, Verdict.WRONG]
    verdicts.append(Verdict.UNVERIFIABLE)
    answers = tuple(_response([7] * n, v) for n, v in zip(lengths, verdicts, strict=True))
    group = Group(Problem("q", np.array([1], np.int32), "7", "toy"), answers)
    found = sequences_of([group], 12, 4)  # the buffer begins beyond 8 tokens
    rewards = np.array([1, 1, 1 - 1 / 4, -1 - 1])
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    assert [s.advantage for s in found] == pytest.approx(expected.tolist())
    packed = micro_batch(found, [1.0] * 4, CPU, RowLayout())
    by_token = np.repeat(expected, lengths[:4]).astype(np.float32)
    assert packed.batch.advantage is not None
    np.testing.assert_allclose(packed.batch.advantage, by_token, rtol=1e-6)
    some = packed.batch.select(torch.tensor([0, 32]))
    assert some.advantage is not None
    np.testing.assert_allclose(some.advantage, by_token[[0, 32]], rtol=1e-6)


def test_a_buffer_that_no_answer_reaches_changes_no_gradient() -> None:
    verdicts = [Verdict.CORRECT, Verdict.WRONG, Verdict.WRONG]
    answers = tuple(_response([7] * 5, verdict) for verdict in verdicts)
    group = Group(Problem("q", np.array([1], np.int32), "7", "toy"), answers)
    losses = []
    for buffer in (0, 4):
        packed = micro_batch(sequences_of([group], 100, buffer), [1.0] * 3, CPU, RowLayout())
        logp = packed.batch.old_logp - 0.1
        losses.append(dapo(packed.batch, logp, ObjectiveConfig(clip_high=0.28)).loss)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
