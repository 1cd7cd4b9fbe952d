"""The verifier against hostile answers and dead workers.

Rows 1 to 3 of field_failures: a dead worker costs no answer, what failed is not wrong, and hostile
answers hold nobody up.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from megatron_nft.config import VerifyConfig
from megatron_nft.rollout.groups import Verdict
from megatron_nft.verify import process, tasks
from megatron_nft.verify import verifier as verifier_module
from megatron_nft.verify.verifier import Question, Verifier

CORRECT, WRONG, UNVERIFIABLE = Verdict.CORRECT, Verdict.WRONG, Verdict.UNVERIFIABLE
TIMEOUT_S = 2.0

# What a policy may write, by accident or not, where the answer is 72.
HOSTILE = {
    "power tower": r"\boxed{9^{9^{9^9}}}",
    "power tower in disguise": r"\boxed{(9^9)^{9^9}}",
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
    "power tower in disguise",
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
def verifier() -> Iterator[Verifier]:
    with Verifier(VerifyConfig(workers=2, timeout_s=TIMEOUT_S)) as verifier:
        yield verifier


def workers_of(verifier: Verifier) -> list[psutil.Process]:
    """Its own processes: other tests leave helpers of multiprocessing beside them."""
    return [psutil.Process(worker.process.pid) for worker in verifier._pool.workers]


def judge(verifier: Verifier, items: Iterable[tuple[str, str]]) -> list[Verdict]:
    return verifier.judge([Question(*item) for item in items])


@pytest.mark.processes
@pytest.mark.alone
def test_hostile_answers_get_a_verdict_in_time_and_disturb_nobody(
    verifier: Verifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    clean = [(text, gold) for text, gold, _ in CLEAN]
    alone = judge(verifier, clean)
    assert alone == [verdict for *_, verdict in CLEAN]
    verifier._cache.clear()
    mixed = []
    for i, text in enumerate(HOSTILE.values()):
        mixed += [(text, "72"), clean[i % len(clean)]]
    start = time.monotonic()
    verdicts = judge(verifier, mixed)
    elapsed_s = time.monotonic() - start
    assert verdicts[1::2] == [alone[i % len(clean)] for i in range(len(HOSTILE))]
    hostile = dict(zip(HOSTILE, verdicts[::2], strict=True))
    assert {name for name, v in hostile.items() if v is CORRECT} == set()
    assert {name: hostile[name] for name in UNDECIDABLE} == dict.fromkeys(UNDECIDABLE, UNVERIFIABLE)
    assert elapsed_s < len(HOSTILE) * (TIMEOUT_S + process.GRACE_S) / 2 + 5
    assert verifier.counts["timeouts"] >= 1
    again = verifier.submit([Question(text, "72") for text in HOSTILE.values()]).result()
    assert any("a power too large" in judgement.reason for judgement in again)
    assert not list(tmp_path.rglob("PWNED"))


@pytest.mark.processes
@pytest.mark.alone
def test_verdicts_come_in_order_and_identical_answers_are_judged_once(verifier: Verifier) -> None:
    items = [(rf"\boxed{{\frac{{{i}}}{{7}}}}", rf"\frac{{{i + i % 3}}}{{7}}") for i in range(60)]
    expected = [CORRECT if i % 3 == 0 else WRONG for i in range(60)]
    before = verifier.counts.copy()
    assert judge(verifier, items + items) == expected + expected
    assert dict(verifier.counts - before) == {"judged": 120, "cached": 60}
    same_answers = [("other words, " + text, gold) for text, gold in items]
    assert judge(verifier, same_answers) == expected
    assert dict(verifier.counts - before) == {"judged": 180, "cached": 120}
    assert judge(verifier, []) == []


@pytest.mark.processes
@pytest.mark.alone
def test_the_cache_is_bounded(verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier._cache.clear()
    monkeypatch.setattr(verifier_module, "MAX_CACHED", 3)
    judge(verifier, [(rf"\boxed{{\frac{{{i}}}{{11}}}}", "x") for i in range(5)])
    assert len(verifier._cache) == 3


@pytest.mark.processes
@pytest.mark.alone
@pytest.mark.parametrize("victim", ["judge", "worker", "all"])
def test_a_killed_process_loses_nothing(verifier: Verifier, victim: str) -> None:
    """SIGKILL strikes while an answer is being judged that takes until its deadline."""
    while not all(worker.is_idle for worker in verifier._pool.workers):
        verifier._cache.clear()
        judge(verifier, [(r"\boxed{\frac{1}{2}}", "0.5")])
    deaths = verifier.counts["worker_deaths"]
    tag = {"judge": 13, "worker": 17, "all": 19}[victim]
    items = [(rf"\boxed{{\frac{{{i}}}{{{tag}}}}}", rf"\frac{{{i}}}{{{tag}}}") for i in range(200)]
    items.insert(0, (rf"\boxed{{({tag}^9)^{{9^9}}}}", "72"))
    items.insert(1, (rf"\boxed{{({tag}^8)^{{9^9}}}}", "72"))

    def strike() -> None:
        workers = workers_of(verifier)
        while verifier._pool.workers[0].attempt is None or not workers[0].children():
            time.sleep(0.01)  # then it is busy until its deadline, and so is its judge
        family = {"judge": workers[0].children(), "worker": workers[:1], "all": workers}[victim]
        for member in family:
            member.kill()

    killer = threading.Thread(target=strike)
    killer.start()
    verdicts = judge(verifier, items)
    killer.join()
    assert verdicts == [UNVERIFIABLE] * 2 + [CORRECT] * 200
    assert verifier.counts["worker_deaths"] > deaths


@pytest.mark.processes
@pytest.mark.alone
def test_verdicts_that_nobody_waits_for_do_not_pass_for_others(verifier: Verifier) -> None:
    asked = [Question(rf"\boxed{{\frac{{{i}}}{{23}}}}", r"\frac{1}{23}") for i in (1, 1, 3)]
    promised = verifier.submit(asked)
    assert judge(verifier, [(r"\boxed{\frac{2}{23}}", r"\frac{1}{23}")]) == [WRONG]
    assert [j.verdict for j in promised.result()] == [CORRECT, CORRECT, WRONG]


@pytest.mark.processes
@pytest.mark.alone
def test_who_has_too_many_answers_waits(
    verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifier_module, "MAX_WAITING", 4)
    items = [(rf"\boxed{{\frac{{{i}}}{{29}}}}", rf"\frac{{{i}}}{{29}}") for i in range(50)]
    with ThreadPoolExecutor(3) as threads:
        found = threads.map(lambda part: judge(verifier, part), (items, items[::-1], items[20:]))
        assert [len(verdicts) for verdicts in found if set(verdicts) == {CORRECT}] == [50, 50, 30]


@pytest.mark.processes
@pytest.mark.alone
def test_workers_are_replaced_after_some_answers() -> None:
    options = VerifyConfig(workers=1, timeout_s=TIMEOUT_S, answers_per_worker=10)
    with Verifier(options) as verifier:
        items = [(rf"\boxed{{\frac{{{i}}}{{31}}}}", rf"\frac{{{i}}}{{31}}") for i in range(35)]
        judges = set()
        for start in range(0, 35, 5):
            assert judge(verifier, items[start : start + 5]) == [CORRECT] * 5
            judges |= {child.pid for child in workers_of(verifier)[0].children()}
        assert len(judges) >= 3
        assert verifier.counts["worker_deaths"] == 0


@pytest.mark.processes
@pytest.mark.alone
def test_nothing_is_left_after_close_even_of_busy_workers() -> None:
    with Verifier(VerifyConfig(workers=1, timeout_s=TIMEOUT_S)) as verifier:
        assert judge(verifier, [(r"\boxed{\frac{1}{2}}", "0.5")]) == [CORRECT]
        worker = psutil.Process(verifier._pool.workers[0].process.pid)
        started = [worker, *worker.children()]
        assert len(started) == 2  # the worker and its judge
        verifier.submit([Question(r"\boxed{(9^9)^{9^9}}", "72")])
    psutil.wait_procs(started, timeout=2)
    assert [p for p in started if is_alive(p)] == []
    with pytest.raises(RuntimeError, match="closed"):
        judge(verifier, [(r"\boxed{\frac{1}{3}}", "0.5")])


@pytest.mark.processes
@pytest.mark.alone
def test_workers_follow_a_parent_that_is_killed(tmp_path: Path) -> None:
    """One worker idle, one in the middle of 9^9^9^9; the parent is heavy and has no guard."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import json, os, psutil, sys\n"
        "assert not os.environ.get('IMPORTED'), 'a worker imported __main__'\n"
        "os.environ['IMPORTED'] = '1'\n"
        "from megatron_nft.config import VerifyConfig\n"
        "from megatron_nft.verify.verifier import Question, Verifier\n"
        "assert not {'torch', 'sympy', 'math_verify'} & set(sys.modules), 'heavy import'\n"
        f"verifier = Verifier(VerifyConfig(workers=2, timeout_s={TIMEOUT_S}))\n"
        "items = [Question(r'\\boxed{\\frac{%d}{2}}' % i, '0.5') for i in range(20)]\n"
        "while not all(w.is_idle for w in verifier._pool.workers):\n"
        "    verifier._cache.clear()\n"
        "    verifier.judge(items)\n"
        "verifier.submit([Question(r'\\boxed{(9^9)^{9^9}}', '72')])\n"
        "family = []\n"
        "while len(family) < 4:\n"  # a judge is forked after its worker is ready
        "    family = psutil.Process().children(recursive=True)\n"
        "print(json.dumps([process.pid for process in family]), flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(process.PACKAGE_ROOT)},
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
@pytest.mark.alone
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
    script = f"import os, time; os.write(1, {tasks.READY}); {program}"
    monkeypatch.setattr(process, "command", lambda _: [sys.executable, "-c", script])
    with Verifier(VerifyConfig(workers=1, timeout_s=0.1)) as verifier:
        assert judge(verifier, [(r"\boxed{\frac{1}{2}}", "0.5")]) == [UNVERIFIABLE]
        assert {name: verifier.counts[name] for name in expected_counts} == expected_counts


@pytest.mark.processes
@pytest.mark.alone
def test_workers_that_cannot_start_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "command", lambda _: [sys.executable, "-c", "raise SystemExit(7)"])
    with (
        Verifier(VerifyConfig(workers=1)) as verifier,
        pytest.raises(RuntimeError, match="exit code 7"),
    ):
        judge(verifier, [(r"\boxed{\frac{1}{2}}", "0.5")])
