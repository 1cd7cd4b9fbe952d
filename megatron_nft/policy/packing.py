"""Sequences into packed micro-batches, balanced over the data-parallel ranks."""

import heapq
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_nft.objectives import TokenBatch
from megatron_nft.policy.attention import PackedRow, pack_row
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

    @property
    def num_tokens(self) -> int:
        """Tokens fed to the model: the last response token is only predicted."""
        return len(self.prompt) + len(self.response) - 1


@dataclass(frozen=True)
class MicroBatch:
    """A packed row of N tokens, R of which predict response tokens."""

    tokens: Tensor  # int64 [1, N]
    row: PackedRow
    predictors: Tensor  # int64 [R], positions in the row whose hidden state predicts a target
    targets: Tensor  # int64 [R], the response tokens
    token_weights: Tensor  # float32 [R], what each token's loss is multiplied by
    batch: TokenBatch


def sequences_of(groups: Seq[Group]) -> list[Sequence]:
    """The judged answers of the groups; an unverifiable answer is not trained on."""
    return [
        Sequence(
            prompt=group.problem.prompt_tokens,
            response=response.tokens,
            logp=response.logp,
            old_logp=response.logp,
            correct=response.correct,
            group_accuracy=group.accuracy,
        )
        for group in groups
        for response in group.responses
        if response.judged and len(response.tokens)
    ]


def deal(lengths: Seq[int], num_ranks: int, budget: int) -> list[list[list[int]]]:
    """Deal sequences to ranks and micro-batches: [rank][micro-batch] -> indices into `lengths`.

    Longest first into the emptiest bin, with as few bins a rank as the token budget allows; each
    rank gets the same number of micro-batches, and a bin may stay empty. A sequence longer than
    the budget has a micro-batch to itself.
    """
    num_bins = num_ranks * max(1, -(-sum(lengths) // (budget * num_ranks)))
    while True:
        bins = _longest_first(lengths, num_bins)
        if all(len(b) <= 1 or sum(lengths[i] for i in b) <= budget for b in bins):
            return [bins[rank::num_ranks] for rank in range(num_ranks)]
        num_bins += num_ranks


def _longest_first(lengths: Seq[int], num_bins: int) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, number) for number in range(num_bins)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, number = heapq.heappop(heap)
        bins[number].append(index)
        heapq.heappush(heap, (load + lengths[index], number))
    return bins


def micro_batch(
    sequences: Seq[Sequence], weights: Seq[float], device: torch.device, multiple: int = 1
) -> MicroBatch:
    """Pack sequences into one row; `weights` is what each sequence's token losses are scaled by.

    The row is padded to `multiple` tokens by a last sequence that predicts nothing; an empty list
    becomes a row of padding alone.
    """
    lengths = [s.num_tokens for s in sequences]
    padding = -sum(lengths) % multiple or (0 if lengths else multiple)
    pieces = [piece for s in sequences for piece in (s.prompt, s.response[:-1])]
    tokens = np.concatenate([*pieces, np.zeros(padding, np.int32)]).astype(np.int64)
    row = pack_row((*lengths, padding) if padding else tuple(lengths), device)
    counts = np.array([len(s.response) for s in sequences], np.int64)
    starts = np.cumsum([0, *lengths[:-1]]) + np.array([len(s.prompt) - 1 for s in sequences] or [0])
    predictors = [np.arange(start, start + n) for start, n in zip(starts, counts, strict=False)]
    return MicroBatch(
        tokens=torch.from_numpy(tokens)[None].to(device),
        row=row,
        predictors=_flat(predictors, torch.int64, device),
        targets=_flat([s.response for s in sequences], torch.int64, device),
        token_weights=_per_token(weights, counts, device),
        batch=TokenBatch(
            old_logp=_flat([s.old_logp for s in sequences], torch.float32, device),
            correct=_per_token([s.correct for s in sequences], counts, device),
            group_accuracy=_per_token([s.group_accuracy for s in sequences], counts, device),
            sequence_ids=_per_token(range(len(sequences)), counts, device).long(),
            num_sequences=len(sequences),
        ),
    )


def _flat(arrays: Seq[np.ndarray], dtype: torch.dtype, device: torch.device) -> Tensor:
    whole = np.concatenate(arrays) if arrays else np.zeros(0)
    return torch.from_numpy(whole).to(device=device, dtype=dtype)


def _per_token(values: Seq[float], counts: np.ndarray, device: torch.device) -> Tensor:
    """One value a sequence, repeated for each of its response tokens; float32 [R]."""
    repeated = np.repeat(np.array(values, np.float64), counts).astype(np.float32)
    return torch.from_numpy(repeated).to(device)
