"""Packing a rollout and a mini-batch: ours beside first-fit and padded batches, with the goals.

    .venv/bin/python benchmarks/packing.py --sigma 0.6 --seed 1

Lengths are log-normal, cut at --max; the defaults are launch/recipes/qwen2.5-32b.yaml's numbers.
Nothing is trained: work is counted, n · (1 + quadratic · n) for a row of n tokens with its padding.

real tokens   of the tokens computed, the rest being padding
fill          real tokens of the micro-batches' budget
DP imbalance  the rank with most work over the mean
sync          the same where ranks wait for each other at every micro-batch (expert parallelism)
work          of the rank with most, relative to ours
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_nft.policy.balance import deal

Rows = list[list[list[int]]]  # [rank][micro-batch] -> tokens of each row, padding included

FILL_GOAL, IMBALANCE_GOAL, SECONDS_GOAL = 0.98, 0.02, 1.0


@dataclass(frozen=True)
class Measured:
    """One way of dealing, for one set of lengths."""

    num_micro_batches: int  # a rank
    real: float  # of the tokens computed
    fill: float  # of the budget
    imbalance: float  # heaviest rank over the mean, less 1
    sync: float  # sum of each index's heaviest micro-batch over the mean rank, less 1
    work: float  # of the heaviest rank, in tokens
    seconds: float


def packed(lengths: list[int], args: argparse.Namespace) -> Rows:
    dealt = deal(lengths, args.ranks, args.budget, quadratic=args.quadratic)
    return [[[lengths[i] for i in indices] for indices in bins] for bins in dealt]


def first_fit(lengths: list[int], args: argparse.Namespace) -> Rows:
    bins: list[list[int]] = []
    loads = np.zeros(len(lengths), np.int64)
    for n in lengths:
        # The first is always found: an unused bin takes anything.
        number = int(np.argmax((loads + n <= args.budget) | (loads == 0)))
        if number == len(bins):
            bins.append([])
        bins[number].append(n)
        loads[number] += n
    return _round_robin(bins, args.ranks)


def padded_batches(lengths: list[int], args: argparse.Namespace) -> Rows:
    batches: list[list[int]] = []
    for n in lengths:
        longest = max([n, *batches[-1]]) if batches else n
        if not batches or longest * (len(batches[-1]) + 1) > args.budget:
            batches.append([])
        batches[-1].append(n)
    return _round_robin([[max(batch)] * len(batch) for batch in batches], args.ranks)


def padded_rows(lengths: list[int], args: argparse.Namespace) -> Rows:
    return _round_robin([[max(lengths)]] * len(lengths), args.ranks)


def _round_robin(bins: list[list[int]], num_ranks: int) -> Rows:
    bins = bins + [[] for _ in range(-len(bins) % num_ranks)]
    return [bins[rank::num_ranks] for rank in range(num_ranks)]


WAYS: dict[str, Callable[[list[int], argparse.Namespace], Rows]] = {
    "ours": packed,
    "first-fit, round-robin": first_fit,
    "batches padded to their longest": padded_batches,
    "rows padded to the longest of all": padded_rows,
}


def measure(lengths: list[int], way: str, args: argparse.Namespace) -> Measured:
    """Deal the lengths, timed, and count tokens and work."""
    start = time.perf_counter()
    rows = WAYS[way](lengths, args)
    seconds = time.perf_counter() - start
    works = np.array([[sum(n + args.quadratic * n**2 for n in r) for r in bins] for bins in rows])
    totals = works.sum(1)
    return Measured(
        num_micro_batches=works.shape[1],
        real=sum(lengths) / sum(sum(r) for bins in rows for r in bins),
        fill=sum(lengths) / (works.size * args.budget),
        imbalance=totals.max() / totals.mean() - 1,
        sync=works.max(0).sum() / totals.mean() - 1,
        work=totals.max(),
        seconds=seconds,
    )


def table(measured: dict[str, Measured]) -> str:
    """The ways side by side, in Markdown."""
    columns = "micro-batches a rank", "real tokens", "fill", "DP imbalance", "sync", "work", "s"
    lines = ["| | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for way, m in measured.items():
        cells = [way, str(m.num_micro_batches)]
        cells += [f"{x:.1%}" for x in (m.real, m.fill)]
        cells += [f"{x:.2%}" for x in (m.imbalance, m.sync)]
        cells += [f"{m.work / measured['ours'].work:.2f} ×", f"{m.seconds:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def goals(lengths: list[int], ours: Measured, args: argparse.Namespace) -> str:
    """What is aimed at, and whether it is met; whole micro-batches bound the fill of a few."""
    least = -(-sum(lengths) // (args.ranks * args.budget))
    best = sum(lengths) / (least * args.ranks * args.budget)
    fill = min(FILL_GOAL, best)
    checks = (
        (f"fill ≥ {fill:.1%} ({least} micro-batches a rank allow {best:.1%})", ours.fill >= fill),
        (f"DP imbalance ≤ {IMBALANCE_GOAL:.0%}", ours.imbalance <= IMBALANCE_GOAL),
        (f"dealt within {SECONDS_GOAL:.0f} s", ours.seconds <= SECONDS_GOAL),
    )
    return "\n".join(f"- {goal}: {'met' if met else 'NOT met'}" for goal, met in checks)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sequences", type=int, nargs="+", default=[8192, 512])
    parser.add_argument("--mean", type=float, default=3000, help="tokens, before the cut")
    parser.add_argument("--max", type=int, default=16384, help="tokens")
    parser.add_argument("--sigma", type=float, default=0.8, help="of the lengths' logarithm")
    parser.add_argument("--ranks", type=int, default=16, help="data-parallel")
    parser.add_argument("--budget", type=int, default=16384, help="tokens a micro-batch")
    parser.add_argument("--quadratic", type=float, default=64 * 5120 / 31e9, help="see `deal`")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for num in args.sequences:
        random = np.random.default_rng(args.seed)
        drawn = random.lognormal(np.log(args.mean) - args.sigma**2 / 2, args.sigma, num)
        lengths = np.clip(np.rint(drawn), 1, args.max).astype(int).tolist()
        measured = {way: measure(lengths, way, args) for way in WAYS}
        print(f"\n{num:,} sequences, {np.mean(lengths):,.0f} tokens on average, σ {args.sigma},")
        print(f"{args.ranks} ranks, budget {args.budget:,} tokens, seed {args.seed}\n")
        print(table(measured) + "\n\nGoals for ours:\n\n" + goals(lengths, measured["ours"], args))


if __name__ == "__main__":
    main()
