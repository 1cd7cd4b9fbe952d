"""Sequences into packed micro-batches: tokens, targets, and what was said of them."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_nft.objectives import TokenBatch
from megatron_nft.policy.packed_row import PackedRow, pack_row
from megatron_nft.rewards import overlong_advantages
from megatron_nft.rollout.groups import Group


@dataclass(frozen=True)
class Sequence:
    """One answer as the policy sees it: prompt and response tokens, and what was said of them."""

    prompt: np.ndarray  # int32 [P]
    response: np.ndarray  # int32 [T]
    logp: np.ndarray  # float32 [T], of the sampling engine
    old_logp: np.ndarray  # float32 [T], what ratios are taken against
    correct: bool
    group_accuracy: float
    version: int = 0  # of the weights that sampled
    importance: np.ndarray | None = None  # float32 [T], what token losses are multiplied by
    advantage: float | None = None  # where rewards are more than right and wrong

    @property
    def num_tokens(self) -> int:
        """Tokens fed to the model: the last response token is only predicted."""
        return len(self.prompt) + len(self.response) - 1


@dataclass(frozen=True)
class RowLayout:
    """How a row is laid over context-parallel ranks, and what its length must be a multiple of."""

    multiple: int = 1  # of the whole row
    rank: int = 0
    num_ranks: int = 1  # context-parallel

    @property
    def sequence_multiple(self) -> int:
        """A sequence is cut into that many equal chunks."""
        return 2 * self.num_ranks if self.num_ranks > 1 else 1

    def padded(self, num_tokens: int) -> int:
        """Tokens that a sequence takes in the row."""
        return -(-num_tokens // self.sequence_multiple) * self.sequence_multiple

    def spans(self, lengths: Seq[int]) -> tuple[int, ...]:
        """Tokens that each sequence takes in a row, and a last one that fills it up if need be."""
        spans = tuple(self.padded(length) for length in lengths)
        filler = -sum(spans) % self.multiple or (0 if spans else self.multiple)
        return (*spans, filler) if filler else spans


@dataclass(frozen=True)
class MicroBatch:
    """A packed row whose sequences have R response tokens.

    This context-parallel rank holds N of the row's tokens; r of them predict response tokens (all
    R where it is the only one).
    """

    tokens: Tensor  # int64 [1, N]
    row: PackedRow
    predictors: Tensor  # int64 [r], tokens of the row whose hidden state predicts a response token
    predicted: Tensor  # int64 [r], which of the R response tokens each of them predicts
    targets: Tensor  # int64 [r], those response tokens
    token_weights: Tensor  # float32 [R], what each token's loss is multiplied by
    batch: TokenBatch  # of all R


def sequences_of(groups: Seq[Group], longest: int = 0, buffer: int = 0) -> list[Sequence]:
    """The judged answers of the groups; an unverifiable answer is not trained on.

    Args:
        longest, buffer: with a buffer, rewards fall in the last so many tokens of the greatest
            response length, and every sequence has an advantage.
    """

    def advantages(group: Group) -> Seq[float | None]:
        if not buffer:
            return [None] * len(group.responses)
        return overlong_advantages(group.responses, longest, buffer)

    return [
        Sequence(
            prompt=group.problem.prompt_tokens,
            response=response.tokens,
            logp=response.logp,
            old_logp=response.logp,
            correct=response.correct,
            group_accuracy=group.accuracy,
            version=response.version,
            advantage=advantage,
        )
        for group in groups
        for response, advantage in zip(group.responses, advantages(group), strict=True)
        if response.judged and len(response.tokens)
    ]


def micro_batch(
    sequences: Seq[Sequence], weights: Seq[float], device: torch.device, layout: RowLayout
) -> MicroBatch:
    """Pack sequences into one row; `weights` is what each sequence's token losses are scaled by.

    Each sequence is padded at its end as `layout` wants it, and the row by a last sequence that
    predicts nothing; an empty list becomes a row of padding alone.
    """
    spans = layout.spans([s.num_tokens for s in sequences])
    row = pack_row(spans, device, layout.rank, layout.num_ranks)
    tokens, predicts = (x[row.tokens] for x in _whole_row(sequences, spans))
    predictors = torch.nonzero(predicts >= 0).squeeze(1)
    predicted = predicts[predictors]
    counts = np.array([len(s.response) for s in sequences], np.int64)
    return MicroBatch(
        tokens=tokens[None].to(device),
        row=row,
        predictors=predictors.to(device),
        predicted=predicted.to(device),
        targets=_flat([s.response for s in sequences], torch.int64)[predicted].to(device),
        token_weights=(_per_token(weights, counts) * _importance(sequences)).to(device),
        batch=_token_batch(sequences, counts, device),
    )


def _whole_row(sequences: Seq[Sequence], spans: Seq[int]) -> tuple[Tensor, Tensor]:
    """The row's tokens, and which of all response tokens each of them predicts; −1: none."""
    tokens = np.zeros(sum(spans), np.int64)
    predicts = np.full(len(tokens), -1)
    first = num_before = 0
    for sequence, span in zip(sequences, spans, strict=False):  # a filler comes after them
        num = len(sequence.response)
        start = first + len(sequence.prompt) - 1
        tokens[first : start + 1] = sequence.prompt
        tokens[start + 1 : start + num] = sequence.response[:-1]
        predicts[start : start + num] = np.arange(num_before, num_before + num)
        first, num_before = first + span, num_before + num
    return torch.from_numpy(tokens), torch.from_numpy(predicts)


def _token_batch(sequences: Seq[Sequence], counts: np.ndarray, device: torch.device) -> TokenBatch:
    return TokenBatch(
        old_logp=_flat([s.old_logp for s in sequences], torch.float32).to(device),
        correct=_per_token([s.correct for s in sequences], counts).to(device),
        group_accuracy=_per_token([s.group_accuracy for s in sequences], counts).to(device),
        sequence_ids=_per_token(range(len(sequences)), counts).long().to(device),
        num_sequences=len(sequences),
        advantage=_advantage(sequences, counts, device),
    )


def _advantage(sequences: Seq[Sequence], counts: np.ndarray, device: torch.device) -> Tensor | None:
    given = [s.advantage for s in sequences if s.advantage is not None]
    assert len(given) in (0, len(sequences)), "all of a run's sequences have one, or none"
    return _per_token(given, counts).to(device) if given else None


def _importance(sequences: Seq[Sequence]) -> Tensor:
    """What each token's loss is multiplied by beside its sequence's weight; float32 [R]."""
    ones = (np.ones(len(s.response), np.float32) for s in sequences)
    given = (s.importance for s in sequences)
    pairs = zip(given, ones, strict=True)
    return _flat([one if weight is None else weight for weight, one in pairs], torch.float32)


def _flat(arrays: Seq[np.ndarray], dtype: torch.dtype) -> Tensor:
    whole = np.concatenate(arrays) if arrays else np.zeros(0)
    return torch.from_numpy(whole).to(dtype)


def _per_token(values: Seq[float], counts: np.ndarray) -> Tensor:
    """One value a sequence, repeated for each of its response tokens; float32 [R]."""
    repeated = np.repeat(np.array(values, np.float64), counts).astype(np.float32)
    return torch.from_numpy(repeated)
