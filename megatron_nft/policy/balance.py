"""Which sequence goes to which data-parallel rank and micro-batch: full rows, equal work.

A rank runs its micro-batches one after the other and waits for the others at the optimizer step,
so the ranks' total work must agree. Expert parallelism and pipelines also wait at every
micro-batch, so those of the same index should agree as well. In order of precedence:

1. as few micro-batches as best-fit decreasing needs, rounded up to what the ranks share evenly;
2. no micro-batch longer than it must be (MULTIFIT: the least capacity at which that many suffice);
3. micro-batches sorted by work, and of every `num_ranks` neighbours one to each rank;
4. sequences swapped between the heaviest and the lightest rank until their work agrees.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

TOLERANCE = 1e-3  # of a rank's mean work; levelling further would be lost in the kernels' noise
SWAPS_PER_RANK = 4  # bounds the time where lengths do not allow the tolerance


def deal(
    lengths: Sequence[int],
    num_ranks: int,
    budget: int,
    *,
    quadratic: float = 0.0,
    multiple: int = 1,
) -> list[list[list[int]]]:
    """Deal sequences to ranks and micro-batches: [rank][micro-batch] -> indices into `lengths`.

    A micro-batch has at most `budget` tokens; a sequence longer than that is alone in one. Every
    rank gets the same number of micro-batches, a multiple of `multiple` (interleaved pipelines
    want that of their size) and at least that many; some are empty where sequences are few. Each
    rank's come heaviest first. The result depends on the arguments alone.

    The work of a sequence of n tokens is n · (1 + quadratic · n). Forward, a token costs 2 · P
    flops in the matrix products of P parameters and, looking back on n / 2 tokens on average,
    2 · n · L · heads · head_dim in causal attention (scores and values, 2 flops each a channel);
    backward doubles both. Hence quadratic = L · heads · head_dim / P, per token: for Qwen2.5-32B
    64 · 5120 / 31e9 ≈ 1e-5, 17 % on top for a sequence of 16,384 tokens.
    """
    assert num_ranks >= 1, num_ranks
    assert multiple >= 1, multiple
    assert quadratic >= 0, quadratic
    # One more entry, at index -1: "no sequence", of no tokens.
    tokens = np.array([*lengths, 0], np.int64)
    work = tokens * (1 + quadratic * tokens)
    bins = _pack(tokens[:-1].tolist(), num_ranks * multiple, budget)
    bins.sort(key=lambda indices: -work[indices].sum())
    num_slots = len(bins) // num_ranks

    rank, slot = np.full((2, len(tokens)), -1)
    for number, indices in enumerate(bins):
        row, place = divmod(number, num_ranks)
        # Every other row backwards, or the first rank would get the heaviest of each.
        rank[indices] = num_ranks - 1 - place if row % 2 else place
        slot[indices] = row
    # Packing keeps within mean + longest; so shall levelling, however large the budget.
    limit = min(budget, -(-tokens.sum() // len(bins)) + tokens.max())
    _level(rank, slot, tokens, work, (num_ranks, num_slots), limit)

    dealt: list[list[list[int]]] = [[[] for _ in range(num_slots)] for _ in range(num_ranks)]
    for index in range(len(lengths)):
        dealt[rank[index]][slot[index]].append(index)
    return [sorted(bins, key=lambda indices: -work[indices].sum()) for bins in dealt]


def _pack(lengths: list[int], step: int, budget: int) -> list[list[int]]:
    """As few bins as best-fit decreasing needs, a multiple of `step`, as even as it makes them."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins = _best_fit(lengths, order, budget)
    num_bins = step * max(1, -(-len(bins) // step))
    low, high = 0, budget  # capacities: too small, large enough
    while high - low > 1:
        middle = (low + high) // 2
        tighter = _best_fit(lengths, order, middle)
        if len(tighter) <= num_bins:
            bins, high = tighter, middle
        else:
            low = middle
    return bins + [[] for _ in range(num_bins - len(bins))]


def _best_fit(lengths: list[int], order: list[int], capacity: int) -> list[list[int]]:
    """Each sequence, in `order`, into the fullest bin with room for it, or else into a new one."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, bin), sorted; negative where one is too long
    for index in order:
        at = bisect_left(rooms, (lengths[index], 0))
        if at < len(rooms):
            room, number = rooms.pop(at)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(index)
        insort(rooms, (room - lengths[index], number))
    return bins


def _level(
    rank: np.ndarray,
    slot: np.ndarray,
    tokens: np.ndarray,
    work: np.ndarray,
    shape: tuple[int, int],
    limit: int,
) -> None:
    """Move work from the heaviest to the lightest rank, in place, by swapping two sequences.

    Or a sequence for none. `shape` is (ranks, micro-batches a rank). The best swap halves the gap;
    preferred are those that leave the receiver lighter than another rank's micro-batch of the same
    index. No micro-batch grows beyond `limit` tokens.
    """
    loads, works = np.zeros(shape, np.int64), np.zeros(shape)
    np.add.at(loads, (rank[:-1], slot[:-1]), tokens[:-1])
    np.add.at(works, (rank[:-1], slot[:-1]), work[:-1])
    for _ in range(SWAPS_PER_RANK * shape[0]):
        totals = works.sum(1)
        high, low = totals.argmax(), totals.argmin()
        gap = totals[high] - totals[low]
        if gap <= TOLERANCE * totals.mean():
            return
        given, taken = np.flatnonzero(rank == high), np.flatnonzero(rank == low)
        into = np.concatenate([slot[taken], np.arange(shape[1])])
        taken = np.concatenate([taken, np.full(shape[1], -1)])
        moved = work[given][:, None] - work[taken]  # [given, taken]
        fits = loads[low, into] + tokens[given][:, None] - tokens[taken] <= limit
        lighter = works[low, into] + moved <= works.max(0)[into]
        gain = np.minimum(moved, gap - moved)
        gain = np.where(fits & (gain > 0), gain + gap * lighter, 0)
        if not gain.any():
            return
        row, column = np.unravel_index(gain.argmax(), gain.shape)
        swap = ((given[row], low, into[column]), (taken[column], high, slot[given[row]]))
        for index, *to in swap:
            for sums, values in ((loads, tokens), (works, work)):
                sums[rank[index], slot[index]] -= values[index]
                sums[*to] += values[index]
            if index >= 0:
                rank[index], slot[index] = to
