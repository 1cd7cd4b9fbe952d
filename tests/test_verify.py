"""Verdicts against values worked out by hand; the pool against hostile answers and dead workers."""

import inspect
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from megatron_nft.config import VerifyConfig
from megatron_nft.rollout.groups import Verdict
from megatron_nft.verify import answers, pool
from megatron_nft.verify.answers import equivalent, extract, judge, last_boxed
from megatron_nft.verify.pool import Verifier

CORRECT, WRONG, UNVERIFIABLE = Verdict.CORRECT, Verdict.WRONG, Verdict.UNVERIFIABLE
TIMEOUT_S = 2.0


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{72}", "72"),
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\sqrt{\frac{a_{1}}{b^{2}}}}}}", r"\sqrt{\frac{a_{1}}{b^{2}}}"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\left\{1, 2\right.}", r"\left\{1, 2\right."),
        (r"\boxed{1\\{2}}", r"1\\{2}"),
        (r"\boxed{5} no: \boxed{7", None),
        (r"boxed{5}", None),
        ("", None),
    ],
)
def test_last_box(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "extracted"),
    [
        (r"so \boxed{ 5 }.", r"\boxed{5}"),
        (r"\boxed{5.}", r"\boxed{5}"),
        (r"\boxed{\left\{1\right.}", r"\boxed{\left\{1\right.}"),
        (r"\boxed{0.333...}", r"\boxed{0.333...}"),
        (r"12 \boxed{}", None),
        (r"12 \boxed{7", None),
        ("I do not know.", None),
        ("1" * 5000 + " is it", ("1" * 5000 + " is it")[-answers.MAX_TAIL_CHARS :]),
    ],
)
def test_extract(text: str, extracted: str | None) -> None:
    assert extract(text) == extracted


# (text, gold): expected by hand, independent of math-verify
TABLE = [
    (r"Thus \boxed{72}", "72", CORRECT),
    (r"Thus \boxed{73}", "72", WRONG),
    (r"\boxed{025}", "25", CORRECT),
    (r"\boxed{27}", "27.0", CORRECT),
    (r"\boxed{72.}", "72", CORRECT),
    (r"\boxed{-5}", "5", WRONG),
    (r"\boxed{1,000}", "1000", CORRECT),
    (r"\boxed{1{,}000}", "1,000", CORRECT),
    # fractions, decimals, percent
    (r"\boxed{0.5}", r"\frac{1}{2}", CORRECT),
    (r"\boxed{\dfrac{2}{4}}", r"\frac12", CORRECT),
    (r"\boxed{1/2}", "0.5", CORRECT),
    (r"\boxed{0.33}", r"\frac13", WRONG),
    (r"\boxed{50\%}", "0.5", CORRECT),
    (r"\boxed{50\%}", r"50\%", CORRECT),
    (r"\boxed{5\%}", "0.5", WRONG),
    (r"\boxed{4.5 \times 10^{33}}", "4.5e33", CORRECT),
    (r"\boxed{4.5e33}", r"4.5 \times 10^{33}", CORRECT),
    (r"\boxed{4.6 \times 10^{33}}", "4.5e33", WRONG),
    (r"\boxed{2e-3}", r"2e - 3", CORRECT),
    # expressions, equations
    (r"\boxed{x^2+2x+1}", "(x+1)^2", CORRECT),
    (r"\boxed{x^2+2x}", "(x+1)^2", WRONG),
    (r"\boxed{x^2}", "x^2", CORRECT),
    (r"\boxed{x=5}", "5", CORRECT),
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", CORRECT),
    (r"\boxed{\frac{1}{0}}", "72", WRONG),
    # tuples, sets, intervals
    (r"\boxed{(3, 4)}", "(3,4)", CORRECT),
    (r"\boxed{(4,3)}", "(3,4)", WRONG),
    (r"\boxed{\{2, 1\}}", r"\{1,2\}", CORRECT),
    (r"\boxed{\{1,2,3\}}", r"\{1,2\}", WRONG),
    (r"\boxed{84, 69}", "$69$,$84$", CORRECT),
    (r"\boxed{5 \text{ or } 3}", "3,5", CORRECT),
    (r"\boxed{\left[1,2\right)}", "[1,2)", CORRECT),
    (r"\boxed{[1,2]}", "[1,2)", WRONG),
    # units, words
    (r"\boxed{5 \text{ cm}}", "5", CORRECT),
    (r"\boxed{\$5}", r"\$5", CORRECT),
    (r"\boxed{90^\circ}", "90", CORRECT),
    (r"\boxed{\text{Evelyn}}", "Evelyn", CORRECT),
    (r"\boxed{\text{Bob}}", r"\text{Evelyn}", WRONG),
    # how gold answers are written
    (r"\boxed{5}", "$5$", CORRECT),
    (r"\boxed{5}", r"The answer is \boxed{5}.", CORRECT),
    (r"\boxed{2n-2}", r"['$2n-2$']", CORRECT),
    (r"\boxed{2}", '["2"]', CORRECT),
    (r"\boxed{3, 1}", "['1', '3']", CORRECT),
    (r"\boxed{1}", "['1', '3']", WRONG),
    # no box, several boxes, broken boxes
    ("The answer is 72.", "72", CORRECT),
    ("The answer is $\\frac{3}{4}$.", "0.75", CORRECT),
    ("The answer is 71.", "72", WRONG),
    (r"\boxed{72}, no, \boxed{71}", "72", WRONG),
    (r"\boxed{71}, no, \boxed{72}", "72", CORRECT),
    ("No idea.", "72", WRONG),
    ("", "72", WRONG),
    (r"72 \boxed{}", "72", WRONG),
    (r"72 \boxed{72", "72", WRONG),
    (r"\boxed{#%&}", "72", WRONG),
    # gold answers that cannot be read
    (r"\boxed{72}", "", UNVERIFIABLE),
    (r"\boxed{72}", " \n", UNVERIFIABLE),
    (r"\boxed{72}", "???", UNVERIFIABLE),
    (r"\boxed{72}", r"\boxed{", UNVERIFIABLE),
    (r"\boxed{72}", "['1', 2]", UNVERIFIABLE),
    (r"\boxed{\pi}", "1" * 5000, UNVERIFIABLE),
]


@pytest.mark.parametrize(("text", "gold", "verdict"), TABLE)
def test_judge(text: str, gold: str, verdict: Verdict) -> None:
    assert judge(text, gold) is verdict


def test_a_failure_that_math_verify_swallows_is_not_a_wrong_answer() -> None:
    """It overruns the stack on deep answers, catches that, and would say "different"."""
    import math_verify

    answer, gold = r"\boxed{" + "(" * 20 + "2" + ")" * 20 + "}", r"\frac{4}{2}"
    assert judge(answer, gold) is CORRECT
    math_verify.parser.parse_latex_cached.cache_clear()
    math_verify.parser.extract_latex.cache_clear()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        assert judge(answer, gold) is UNVERIFIABLE
    finally:
        sys.setrecursionlimit(limit)


def test_plain_integers_are_compared_as_math_verify_does() -> None:
    import math_verify

    rng = random.Random(0)
    numerals = ["0", "-0", "00", "7", "-7", "007", "-007", "70", "1000", "9" * 40]
    numerals += [str(rng.randint(-(10**n), 10**n)) for n in (1, 1, 2, 2, 3, 9, 18, 30)]
    for gold in numerals:
        for answer in numerals:
            parsed = [
                math_verify.parse(rf"\boxed{{{s}}}", parsing_timeout=None) for s in (gold, answer)
            ]
            expected = CORRECT if math_verify.verify(*parsed, timeout_seconds=None) else WRONG
            assert answers.decide_unparsed(rf"\boxed{{{answer}}}", gold) is expected


# What a policy may write, by accident or not, where the answer is 72.
HOSTILE = {
    "power tower": r"\boxed{9^{9^{9^9}}}",
    "factorial": r"\boxed{(10^7)!}",
    "power tower without box": "The answer is 9**9**9**9",
    "memory bomb": r"\boxed{2^{2^{36}} - 2^{2^{36}} + 72}",
    "3000 parentheses": r"\boxed{" + "(" * 3000 + "72" + ")" * 3000 + "}",
    "300 parentheses": r"\boxed{" + "(" * 300 + "72" + ")" * 300 + "}",
    "braces": "{" * 10**5,
    "boxes": r"\boxed{" * 10**5,
    "code": r"""\boxed{__import__('os').system('touch PWNED')}""",
    "code without box": """The answer is __import__('os').system('touch PWNED') + 1""",
    "null bytes": "\0" * 10 + r"\boxed{\0 7 \0}",
    "control characters": r"\boxed{" + "".join(map(chr, range(32))) + "}",
    "lone surrogates": "\ud800" + r"\boxed{7 \udc00" + "\udfff}",
    "dollars": "answer $" * 10**4,
    "2 MB of digits": r"\boxed{" + "1" * 2 * 10**6 + "}",
    "2 MB of numbers": "7 " * 10**6,
}
UNDECIDABLE = (
    "power tower",
    "factorial",
    "power tower without box",
    "memory bomb",
    "3000 parentheses",
    "300 parentheses",
    "2 MB of digits",
)
CLEAN = [
    (r"\boxed{\frac{144}{2}}", "72", CORRECT),
    (r"\boxed{\frac{143}{2}}", "72", WRONG),
    ("x" * 2 * 10**6 + r"\boxed{\sqrt{2}}", r"2^{\frac12}", CORRECT),
    (r"\boxed{72}", "", UNVERIFIABLE),
]


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    with Verifier(VerifyConfig(workers=2, timeout_s=TIMEOUT_S)) as verifier:
        yield verifier


def workers_of(verifier: Verifier) -> list[psutil.Process]:
    """Its own processes: other tests leave helpers of multiprocessing beside them."""
    return [psutil.Process(worker.process.pid) for worker in verifier._workers]


@pytest.mark.processes
def test_hostile_answers_get_a_verdict_in_time_and_disturb_nobody(
    verifier: Verifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    clean = [(text, gold) for text, gold, _ in CLEAN]
    alone = verifier.judge(clean)
    assert alone == [verdict for *_, verdict in CLEAN]
    verifier._cache.clear()
    mixed = []
    for i, text in enumerate(HOSTILE.values()):
        mixed += [(text, "72"), clean[i % len(clean)]]
    start = time.monotonic()
    verdicts = verifier.judge(mixed)
    elapsed_s = time.monotonic() - start
    assert verdicts[1::2] == [alone[i % len(clean)] for i in range(len(HOSTILE))]
    hostile = dict(zip(HOSTILE, verdicts[::2], strict=True))
    assert {name for name, v in hostile.items() if v is CORRECT} == set()
    assert {name: hostile[name] for name in UNDECIDABLE} == dict.fromkeys(UNDECIDABLE, UNVERIFIABLE)
    assert elapsed_s < len(HOSTILE) * (TIMEOUT_S + pool.GRACE_S) / 2 + 5
    assert verifier.counts["timeouts"] >= 3
    assert not list(tmp_path.rglob("PWNED"))


@pytest.mark.processes
def test_verdicts_come_in_order_and_identical_answers_are_judged_once(verifier: Verifier) -> None:
    items = [(rf"\boxed{{\frac{{{i}}}{{7}}}}", rf"\frac{{{i + i % 3}}}{{7}}") for i in range(60)]
    expected = [CORRECT if i % 3 == 0 else WRONG for i in range(60)]
    before = verifier.counts.copy()
    assert verifier.judge(items + items) == expected + expected
    assert verifier.counts - before == {"judged": 120, "cached": 60}
    same_answers = [("other words, " + text, gold) for text, gold in items]
    assert verifier.judge(same_answers) == expected
    assert verifier.counts - before == {"judged": 180, "cached": 120}
    assert verifier.judge([]) == []


@pytest.mark.processes
def test_the_cache_is_bounded(verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier._cache.clear()
    monkeypatch.setattr(pool, "MAX_CACHED", 3)
    verifier.judge([(rf"\boxed{{\frac{{{i}}}{{11}}}}", "x") for i in range(5)])
    assert len(verifier._cache) == 3


@pytest.mark.processes
@pytest.mark.parametrize("victim", ["judge", "worker", "all"])
def test_a_killed_process_loses_nothing(verifier: Verifier, victim: str) -> None:
    """SIGKILL strikes while an answer is being judged that takes until its deadline."""
    while not all(worker.is_idle for worker in verifier._workers):
        verifier._cache.clear()
        verifier.judge([(r"\boxed{\frac{1}{2}}", "0.5")])
    deaths = verifier.counts["worker_deaths"]
    tag = {"judge": 13, "worker": 17, "all": 19}[victim]
    items = [(rf"\boxed{{\frac{{{i}}}{{{tag}}}}}", rf"\frac{{{i}}}{{{tag}}}") for i in range(200)]
    items.insert(0, (rf"\boxed{{{tag}^{{9^{{9^9}}}}}}", "72"))
    items.insert(1, (rf"\boxed{{{tag}^{{8^{{9^9}}}}}}", "72"))

    def strike() -> None:
        workers = workers_of(verifier)
        while verifier._workers[0].task is None or not workers[0].children():
            time.sleep(0.01)  # then it is busy until its deadline, and so is its judge
        family = {"judge": workers[0].children(), "worker": workers[:1], "all": workers}[victim]
        for process in family:
            process.kill()

    killer = threading.Thread(target=strike)
    killer.start()
    verdicts = verifier.judge(items)
    killer.join()
    assert verdicts == [UNVERIFIABLE] * 2 + [CORRECT] * 200
    assert verifier.counts["worker_deaths"] > deaths


@pytest.mark.processes
def test_an_exception_in_the_middle_leaves_no_stale_verdict(
    verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(verifier, "_hear", interrupted)
        with pytest.raises(KeyboardInterrupt):
            verifier.judge([(rf"\boxed{{\frac{{{i}}}{{23}}}}", r"\frac{1}{23}") for i in (1, 1, 1)])
    assert verifier.judge([(r"\boxed{\frac{2}{23}}", r"\frac{1}{23}")]) == [WRONG]


@pytest.mark.processes
def test_nothing_is_left_after_close_even_of_busy_workers() -> None:
    with Verifier(VerifyConfig(workers=1, timeout_s=TIMEOUT_S)) as verifier:
        assert verifier.judge([(r"\boxed{\frac{1}{2}}", "0.5")]) == [CORRECT]
        worker = psutil.Process(verifier._workers[0].process.pid)
        started = [worker, *worker.children()]
        assert len(started) == 2  # the worker and its judge
        verifier._workers[0].send(pool._Task((r"\boxed{9^{9^{9^9}}}", "72")), TIMEOUT_S)
    psutil.wait_procs(started, timeout=2)
    assert [p for p in started if is_alive(p)] == []
    with pytest.raises(RuntimeError, match="closed"):
        verifier.judge([])


@pytest.mark.processes
def test_workers_follow_a_parent_that_is_killed(tmp_path: Path) -> None:
    """One worker idle, one in the middle of 9^9^9^9; the parent is heavy and has no guard."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import json, os, psutil, sys\n"
        "assert not os.environ.get('IMPORTED'), 'a worker imported __main__'\n"
        "os.environ['IMPORTED'] = '1'\n"
        "from megatron_nft.config import VerifyConfig\n"
        "from megatron_nft.verify.pool import Verifier, _Task\n"
        "assert not {'torch', 'sympy', 'math_verify'} & set(sys.modules), 'heavy import'\n"
        f"verifier = Verifier(VerifyConfig(workers=2, timeout_s={TIMEOUT_S}))\n"
        "items = [(r'\\boxed{\\frac{%d}{2}}' % i, '0.5') for i in range(20)]\n"
        "while not all(w.is_idle for w in verifier._workers):\n"
        "    verifier._cache.clear()\n"
        "    verifier.judge(items)\n"
        "verifier._workers[0].send(_Task((r'\\boxed{9^{9^{9^9}}}', '72')), 9)\n"
        "family = psutil.Process().children(recursive=True)\n"
        "print(json.dumps([process.pid for process in family]), flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(pool.PACKAGE_ROOT)},
    )
    with parent:
        pids = json.loads(parent.stdout.readline())
        assert len(pids) == 4  # two workers, each with its judge
        processes = [psutil.Process(pid) for pid in pids]
        parent.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=TIMEOUT_S + 5)
    assert [p for p in processes if is_alive(p)] == []


def is_alive(process: psutil.Process) -> bool:
    """Zombies are dead: reaping an orphan is up to the host's init."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.processes
@pytest.mark.parametrize(
    ("program", "expected_counts"),
    [
        ("input()", {"timeouts": 0, "worker_deaths": 2}),
        ("time.sleep(99)", {"timeouts": 1, "worker_deaths": 0}),
    ],
    ids=["dies of it twice", "hangs without noticing"],
)
def test_a_worker_that_fails_makes_an_answer_unverifiable(
    program: str, expected_counts: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"import os, time; os.write(1, b'ready\\n'); {program}"
    monkeypatch.setattr(pool, "_command", lambda _: [sys.executable, "-c", script])
    with Verifier(VerifyConfig(workers=1, timeout_s=0.1)) as verifier:
        assert verifier.judge([(r"\boxed{\frac{1}{2}}", "0.5")]) == [UNVERIFIABLE]
        assert {name: verifier.counts[name] for name in expected_counts} == expected_counts


@pytest.mark.processes
def test_workers_that_cannot_start_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_command", lambda _: [sys.executable, "-c", "raise SystemExit(7)"])
    with (
        Verifier(VerifyConfig(workers=1)) as verifier,
        pytest.raises(RuntimeError, match="exit code 7"),
    ):
        verifier.judge([(r"\boxed{\frac{1}{2}}", "0.5")])


def test_an_answer_that_was_extracted_needs_no_text() -> None:
    text = r"long \boxed{1} reasoning \boxed{\frac{1}{2}}"
    assert equivalent(extract(text), "0.5") is judge(text, "0.5") is CORRECT
