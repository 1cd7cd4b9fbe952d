"""Twenty thousand answers as a policy may write them, by accident or not, and workers that die.

Rows 1 to 3 of field_failures: whatever is thrown at the verifier, nothing stalls, nothing raises,
every answer gets a verdict, and the clean ones among them get theirs.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from megatron_nft.config import VerifyConfig
from megatron_nft.rollout.groups import Verdict
from megatron_nft.verify.verifier import Question, Verifier

NUM_CLEAN, NUM_MUTATED, NUM_HOSTILE = 15_000, 3_000, 2_000
TIMEOUT_S = 0.5
KILL_EVERY_S = 4.0
Known = tuple[str, str, Verdict]  # text, known answer, expected verdict


def _clean(rng: random.Random) -> Known:
    """An answer whose verdict is known from how it was made."""
    a, b, is_right = rng.randint(-(10**6), 10**6), rng.randint(2, 999), rng.random() < 0.5
    kind = rng.choices(["integer", "fraction", "decimal", "root"], [10, 2, 1, 1])[0]
    off = 0 if is_right else rng.randint(1, 9)
    text, gold = {
        "integer": lambda: (f"{a + off}", f"{a}"),
        "fraction": lambda: (rf"\frac{{{2 * (a + off)}}}{{{2 * b}}}", rf"\frac{{{a}}}{{{b}}}"),
        "decimal": lambda: (f"{(a + off) / 100:.2f}", rf"\frac{{{a}}}{{100}}"),
        "root": lambda: (rf"{b + off}\sqrt{{3}}", rf"\sqrt{{{3 * b * b}}}"),
    }[kind]()
    filler = "step by step " * rng.randint(0, 20)
    return rf"{filler}\boxed{{{text}}}.", gold, Verdict.CORRECT if is_right else Verdict.WRONG


def _mutated(rng: random.Random) -> str:
    """A clean answer with some characters lost, doubled or replaced."""
    text = list(_clean(rng)[0][-60:])
    pieces = [*"{}()[]^_\\$!%&#~/*+-=<>|,;:. 019xyz", "\0", "\x1b", "\ud800", "\u202e", "∞", "½"]
    pieces += [r"\frac", r"\sqrt", r"\boxed{", r"\left(", r"\infty", r"\sum", r"\int", "**"]
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(text))
        text[place : place + rng.randint(0, 2)] = [rng.choice(pieces)] * rng.randint(1, 3)
    return "".join(text)


def _n(rng: random.Random) -> int:
    return rng.randint(2, 9)


HOSTILE: dict[str, Callable[[random.Random], str]] = {
    "tower": lambda r: rf"\boxed{{{_n(r)}^{{{_n(r)}^{{{_n(r)}^{{{_n(r)}{_n(r)}}}}}}}}}",
    "stars": lambda r: f"The answer is {_n(r)}" + f"**{_n(r)}9" * r.randint(3, 9),
    "factorial": lambda r: rf"\boxed{{({_n(r)}0^{{{_n(r)}}})!!}}",
    "braces": lambda r: "{" * r.randint(10, 3000) + rf"\boxed{{{_n(r)}}}",
    "brackets": lambda r: r"\boxed{" + "(" * (d := r.randint(30, 900)) + "72" + ")" * d + "}",
    "boxes": lambda r: r"\boxed{" * r.randint(2, 3000) + "72",
    "digits": lambda r: r"\boxed{" + str(_n(r)) * r.randint(3000, 20_000) + "}",
    "control": lambda r: r"\boxed{" + "".join(chr(r.randrange(32)) for _ in range(40)) + "}",
    "bytes": lambda r: r"\boxed{" + r.randbytes(50).decode("utf-8", "surrogateescape") + "}",
    "import": lambda r: rf"\boxed{{__import__('os').system('touch PWNED{_n(r)}')}}",
    "eval": lambda r: f"Answer: $eval(open('PWNED{_n(r)}', 'w'))$ or exec('import os')",
    "input": lambda r: rf"\boxed{{\input{{/etc/passwd}}\write18{{touch PWNED{_n(r)}}}}}",
    "dollars": lambda r: "so $" * r.randint(100, 3000) + "72",
    "lambda": lambda r: rf"\boxed{{(lambda f: f(f))(lambda f: f(f)) + {_n(r)}}}",
    "format": lambda r: r"\boxed{%s%n{0.__class__}}" + f"{_n(r)}",
}
RARE: dict[str, Callable[[random.Random], str]] = {  # those that only the deadline ends, and bulk
    "disguised tower": lambda r: rf"\boxed{{({_n(r)}^{{99}})^{{({_n(r)}^{{99}})}}}}",
    "disguised bomb": lambda r: rf"\boxed{{(2^{{9{_n(r)}}})^{{(2^{{3{_n(r)}}})}} - 1}}",
    "megabytes": lambda r: f"{_n(r)} x " * 500_000 + rf"\boxed{{{_n(r)}}}",
    "megabytes of digits": lambda r: str(_n(r)) * 2_000_000,
}


def _hostile(rng: random.Random) -> str:
    kinds = RARE if rng.random() < 0.02 else HOSTILE
    return rng.choice(list(kinds.values()))(rng)


@contextmanager
def _workers_dying(verifier: Verifier, seed: int) -> Iterator[list[int]]:
    """SIGKILL for one of the verifier's processes now and then; which were killed."""
    rng, is_over, killed = random.Random(seed), threading.Event(), []

    def strike() -> None:
        while not is_over.wait(KILL_EVERY_S):
            workers = [w for w in list(verifier._pool.workers) if w.is_ready]
            family = [psutil.Process(worker.process.pid) for worker in workers]
            family += [child for worker in family[:1] for child in worker.children()]
            if family:
                victim = rng.choice(family)
                victim.kill()
                killed.append(victim.pid)

    killer = threading.Thread(target=strike)
    killer.start()
    yield killed
    is_over.set()
    killer.join()


@pytest.mark.processes
@pytest.mark.alone
def test_twenty_thousand_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    asked: list[tuple[str, str, Verdict | None]] = [_clean(rng) for _ in range(NUM_CLEAN)]
    asked += [(_mutated(rng), "72", None) for _ in range(NUM_MUTATED)]
    asked += [(_hostile(rng), "72", None) for _ in range(NUM_HOSTILE)]
    rng.shuffle(asked)
    start = time.monotonic()
    with Verifier(VerifyConfig(workers=2, timeout_s=TIMEOUT_S)) as verifier:
        verifier.judge([Question(r"\boxed{\frac{1}{2}}", "0.5")])  # the workers are ready
        with _workers_dying(verifier, seed=0) as killed:
            verdicts = verifier.judge([Question(text, gold) for text, gold, _ in asked])
        counts = verifier.counts
    elapsed_s = time.monotonic() - start
    print(f"{elapsed_s:.1f} s, {len(killed)} killed, {dict(counts)}")
    assert len(verdicts) == len(asked) == 20_000
    assert {type(verdict) for verdict in verdicts} == {Verdict}
    wrong = [
        (text[-80:], gold, expected, verdict)
        for (text, gold, expected), verdict in zip(asked, verdicts, strict=True)
        if expected not in (None, verdict)
    ]
    # one whose worker was killed twice, or that a busy host held up beyond the deadline
    assert [case for case in wrong if case[-1] is not Verdict.UNVERIFIABLE] == []
    assert len(wrong) <= 20
    assert killed
    assert counts["timeouts"] > 0
    assert list(tmp_path.iterdir()) == []
