"""Answers judged a second, and how many of them wrongly: ours, a serial loop, a pool of processes.

    .venv/bin/python benchmarks/verify.py
    .venv/bin/python benchmarks/verify.py --answers 400 --hostile 0 --turns 1

The serial loop is math-verify as its README has it, with its own limit of 5 s; the pool is the same
in a ProcessPoolExecutor, as its limit is an alarm that wants a main thread. Clean answers are made
so that their verdicts are known, and are all different: plain integers, which most training data
has and which cost ours microseconds, and expressions, which all need parsing. Hostile ones are what
a policy may write by accident: most are known by their looks, one in eight costs ours its deadline.
Wrong: a clean answer with the other verdict, or a hostile one that is right. Lost: a clean answer
without a verdict. Start-up is left out. Medians of the turns; ratios are of seconds.
"""

import argparse
import logging
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import product

from megatron_nft.config import VerifyConfig
from megatron_nft.rollout.groups import Verdict
from megatron_nft.verify.verifier import Question, Verifier

HOSTILE = (
    r"\boxed{9^{9^{9^9}}}",
    r"\boxed{(10^7)!}",
    "The answer is 9**9**9**9",
    r"\boxed{" + "(" * 300 + "72" + ")" * 300 + "}",
    r"\boxed{" * 10**5,
    r"\boxed{" + "1" * 2 * 10**6 + "}",
    r"\boxed{2^{2^{36}} - 2^{2^{36}} + 72}",
    r"\boxed{(9^9)^{9^9}}",
)
SERIAL, POOL, OURS = "serial loop", "ProcessPoolExecutor", "ours"
LEAST_CLEAN, LEAST_HOSTILE = 1.7, 50.0  # the goals, times the serial loop


@dataclass(frozen=True)
class Answer:
    text: str
    gold: str
    is_right: bool
    is_hostile: bool = False


@dataclass(frozen=True)
class Outcome:
    seconds: float
    num_wrong: int
    num_lost: int


Judge = Callable[[Sequence[Answer]], list[bool | None]]  # None: no verdict


def expression(rng: random.Random) -> Answer:
    a, b, is_right = rng.randint(-(10**6), 10**6), rng.randint(2, 999), rng.random() < 0.5
    off = 0 if is_right else rng.randint(1, 9)
    kinds = {
        "fraction": (rf"\frac{{{2 * (a + off)}}}{{{2 * b}}}", rf"\frac{{{a}}}{{{b}}}"),
        "decimal": (f"{(a + off) / 100:.2f}", rf"\frac{{{a}}}{{100}}"),
        "root": (rf"{b + off}\sqrt{{3}}", rf"\sqrt{{{3 * b * b}}}"),
        "pair": (rf"({a + off}, \frac{{1}}{{{b}}})", rf"({a}, \frac{{2}}{{{2 * b}}})"),
    }
    text, gold = rng.choice(list(kinds.values()))
    return Answer(rf"Therefore \boxed{{{text}}}.", gold, is_right)


def integer(rng: random.Random) -> Answer:
    a, is_right = rng.randint(-(10**9), 10**9), rng.random() < 0.5
    return Answer(rf"Therefore \boxed{{{a + 1 - is_right}}}.", str(a), is_right)


KINDS = {"plain integers": integer, "expressions": expression}


def answers(num: int, share: float, make: Callable[[random.Random], Answer]) -> list[Answer]:
    """Shuffled; as many of the hostile ones as the share says, in turn."""
    rng = random.Random(0)
    num_hostile = round(num * share)
    texts = (HOSTILE[i % len(HOSTILE)] for i in range(num_hostile))
    found = [Answer(text, "72", is_right=False, is_hostile=True) for text in texts]
    found += [make(rng) for _ in range(num - num_hostile)]
    rng.shuffle(found)
    return found


def by_math_verify(answer: Answer) -> bool:
    """Time-outs and exceptions are "wrong", as in other trainers."""
    import math_verify

    try:
        return math_verify.verify(
            math_verify.parse(rf"\boxed{{{answer.gold}}}"), math_verify.parse(answer.text)
        )
    except Exception:  # noqa: BLE001 - it is what they do
        return False


def serially(asked: Sequence[Answer]) -> list[bool | None]:
    return [by_math_verify(answer) for answer in asked]


def by_pool(pool: ProcessPoolExecutor, asked: Sequence[Answer]) -> list[bool | None]:
    found: list[bool | None] = []
    with suppress(BrokenProcessPool):
        found.extend(pool.map(by_math_verify, asked, chunksize=8))
    return found + [None] * (len(asked) - len(found))


def by_ours(verifier: Verifier, asked: Sequence[Answer]) -> list[bool | None]:
    verifier._cache.clear()  # turns are the same answers
    verdicts = verifier.judge([Question(answer.text, answer.gold) for answer in asked])
    values = {Verdict.CORRECT: True, Verdict.WRONG: False, Verdict.UNVERIFIABLE: None}
    return [values[verdict] for verdict in verdicts]


def outcome(judge: Judge, asked: Sequence[Answer]) -> Outcome:
    start = time.perf_counter()
    found = judge(asked)
    seconds = time.perf_counter() - start
    pairs = list(zip(asked, found, strict=True))
    wrong = sum(v is not None and v != a.is_right for a, v in pairs)
    lost = sum(v is None and not a.is_hostile for a, v in pairs)
    return Outcome(seconds, wrong, lost)


def report(name: str, found: dict[str, list[Outcome]], num: int) -> float:
    """Print a case's rows; how many times as fast as the serial loop ours is."""
    serial = statistics.median(o.seconds for o in found[SERIAL])
    for who, outcomes in found.items():
        seconds = statistics.median(o.seconds for o in outcomes)
        wrong, lost = (
            max(values)
            for values in zip(*((o.num_wrong, o.num_lost) for o in outcomes), strict=True)
        )
        cells = f"{seconds:.2f} | {num / seconds:,.0f} | {serial / seconds:.2f} | {wrong} | {lost}"
        print(f"| {name} | {who} | {cells} |", flush=True)
    return serial / statistics.median(o.seconds for o in found[OURS])


def goal(what: str, ratio: float, least: float, outcomes: Sequence[Outcome]) -> str:
    errors = sum(o.num_wrong + o.num_lost for o in outcomes)
    met = "met" if ratio >= least and not errors else "NOT MET"
    wanted = f"≥ {least} × the serial loop, none wrong or lost"
    return f"Goal: {what}, {wanted}: {ratio:.2f} ×, {errors}: {met}"


def arguments() -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--answers", type=int, default=1600)
    parser.add_argument("--hostile", type=float, nargs="+", default=[0.0, 0.01], help="shares")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=1.0, help="seconds an answer, of ours")
    parser.add_argument("--turns", type=int, default=3, help="of the clean answers; else one")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    print("| answers | judged by | s | answers/s | × serial | wrong | lost |")
    print("|---|---|---:|---:|---:|---:|---:|")
    goals = []
    with ExitStack() as stack:
        pool = stack.enter_context(ProcessPoolExecutor(args.workers))
        options = VerifyConfig(workers=args.workers, timeout_s=args.timeout)
        verifier = stack.enter_context(Verifier(options))
        judges: dict[str, Judge] = {
            SERIAL: serially,
            POOL: partial(by_pool, pool),
            OURS: partial(by_ours, verifier),
        }
        for judge in judges.values():
            judge(answers(8 * args.workers, 0.0, expression))  # imports
        for (what, make), share in product(KINDS.items(), args.hostile):
            name = f"{what}, {share:.0%} hostile"
            asked = answers(args.answers, share, make)
            turns = 1 if share else args.turns
            found = {who: [outcome(judge, asked)] for who, judge in judges.items()}
            for _ in range(turns - 1):
                for who, judge in judges.items():
                    found[who].append(outcome(judge, asked))
            ratio = report(name, found, args.answers)
            least = LEAST_HOSTILE if share else LEAST_CLEAN
            goals.append(goal(name, ratio, least, found[OURS]))
    print("\n" + "\n".join(goals))


if __name__ == "__main__":
    main()
