"""A stall is told, by rank and phase, and ends the job: row 15 of field_failures."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_nft import arithmetic
from megatron_nft.watchdog import EXIT_CODE, Watchdog

# A process that its watchdog is to judge: what it does is in its arguments.
PROCESS = """
import collections, itertools, sys, threading, time
from pathlib import Path
from megatron_nft.metrics import PhaseTimer
from megatron_nft.watchdog import Watchdog

TIMEOUT_S = float(sys.argv[4])
watchdog = Watchdog(Path(sys.argv[1]), TIMEOUT_S, int(sys.argv[2]))
timer = PhaseTimer(watchdog.enter)

def sleeps():
    time.sleep(60)

def waits_for_a_lock():
    lock = threading.Lock()
    with lock, lock:
        pass

def computes_in_c():  # and never lets Python's lock go
    collections.deque(itertools.count(), maxlen=0)

def beats():
    for _ in range(25):
        time.sleep(TIMEOUT_S / 10)
        watchdog.beat()

def works_in_phases():
    for i in range(25):
        with timer.phase(f"phase {i}"):
            time.sleep(TIMEOUT_S / 10)

def stops_and_sleeps():
    watchdog.stop()
    time.sleep(1.5 * TIMEOUT_S)

with timer.phase("update"):
    for name in sys.argv[3].split("+"):
        globals()[name]()
watchdog.stop()
"""
TIMEOUT_S, PATIENCE_S = 1.0, 120.0
RECIPE = """
run_dir: {root}/run
rollouts: 1
model: {{path: {root}/model, dtype: float32}}
parallel: {{tensor: 2}}
data: {{train: [{{path: {root}/sums.jsonl}}], template: raw, max_prompt_tokens: 8}}
rollout: {{questions_asked: 8, answers: 2, max_response_tokens: 12, max_asks: 1000000}}
optimizer: {{tokens_per_microbatch: 99}}
evaluate: {{sets: [{{path: {root}/sums.jsonl}}], every: 1}}
watchdog: {{timeout_s: 20}}
"""


def start(logs: Path, rank: int, what: str, timeout_s: float = TIMEOUT_S) -> subprocess.Popen[str]:
    arguments = map(str, (logs, rank, what, timeout_s))
    command = [sys.executable, "-c", PROCESS, *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr of a process that ends in time."""
    try:
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, stderr


@pytest.mark.parametrize("what", ["sleeps", "waits_for_a_lock"])
def test_a_stall_is_told_and_ends_the_process(tmp_path: Path, what: str) -> None:
    begun = time.monotonic()
    code, stderr = end(start(tmp_path, 3, what))
    assert code == EXIT_CODE
    assert time.monotonic() - begun > TIMEOUT_S
    report = (tmp_path / "watchdog_rank_3.txt").read_text()
    host = re.escape(os.uname().nodename)
    pattern = rf"watchdog: rank 3 on {host} .* no progress for [1-9] s, phase: update"
    assert re.search(pattern, report)
    assert f"in {what}\n" in report  # the main thread's stack
    assert "in _watch\n" in report  # and the other's
    assert report == stderr
    assert (tmp_path / "watchdog.txt").read_text() == report.partition("\n")[0] + "\n"


def test_a_stall_that_keeps_pythons_lock_ends_the_process_too(tmp_path: Path) -> None:
    """Unless it begins while the timer is wound up anew, which takes microseconds at every look."""
    for _ in range(3):
        with contextlib.suppress(subprocess.TimeoutExpired):
            code, _ = end(start(tmp_path, 0, "computes_in_c"))
            break
    assert code == 1
    assert "in computes_in_c\n" in (tmp_path / "watchdog_rank_0.txt").read_text()


@pytest.mark.parametrize("what", ["beats", "works_in_phases", "stops_and_sleeps"])
def test_who_makes_progress_or_is_watched_no_more_lives(tmp_path: Path, what: str) -> None:
    assert end(start(tmp_path, 0, what)) == (0, "")
    assert not (tmp_path / "watchdog_rank_0.txt").exists()
    assert (tmp_path / "watchdog.txt").read_text() == ""


def test_ranks_live_by_each_others_progress_and_all_report(tmp_path: Path) -> None:
    ranks = [start(tmp_path, 0, "beats+sleeps")]
    until((tmp_path / "watchdog_rank_0.txt").exists, ranks[0])
    ranks.append(start(tmp_path, 1, "sleeps"))
    assert [end(rank)[0] for rank in ranks] == [EXIT_CODE, EXIT_CODE]
    reports = [(tmp_path / f"watchdog_rank_{rank}.txt").read_text() for rank in range(2)]
    idle_s = [int(re.search(r"no progress for (\d+) s", report).group(1)) for report in reports]
    assert idle_s[1] > idle_s[0] >= TIMEOUT_S  # rank 1 lived as long as rank 0 made progress
    assert len((tmp_path / "watchdog.txt").read_text().splitlines()) == 2


def test_who_is_not_stuck_yet_reports_with_the_others(tmp_path: Path) -> None:
    """A rank that saw progress later than another is not ended in silence."""
    ranks = [start(tmp_path, 0, "sleeps", timeout_s=10.0)]
    until((tmp_path / "watchdog_rank_0.txt").exists, ranks[0])
    ranks.append(start(tmp_path, 1, "sleeps"))
    assert [end(rank)[0] for rank in ranks] == [EXIT_CODE, EXIT_CODE]
    report = (tmp_path / "watchdog_rank_0.txt").read_text()
    assert "(another rank told of a stall in watchdog.txt)" in report


def test_a_timeout_of_zero_watches_nothing(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 0) as watchdog:
        watchdog.beat()
    assert not list(tmp_path.iterdir())


@pytest.mark.processes
@pytest.mark.alone
def test_a_rank_that_hangs_ends_the_run_and_all_that_it_started(tmp_path: Path) -> None:
    """Row 15 of field_failures: rank 1 is stopped, and rank 0 waits for it in a collective."""
    launcher, metrics = start_run(tmp_path), tmp_path / "run" / "metrics.jsonl"
    try:
        until(lambda: metrics.exists() and metrics.stat().st_size > 0, launcher)  # it has evaluated
        time.sleep(3)  # in the rollout now, which has no end
        first, second = training_processes(launcher)
        job = first.environ()["TORCHELASTIC_RUN_ID"]
        assert len(processes_of(job)) >= 4  # two verifiers as well
        second.send_signal(signal.SIGSTOP)
        _, stderr = launcher.communicate(timeout=200)
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGTERM)  # torchrun ends the others
    assert launcher.returncode == EXIT_CODE
    report = (tmp_path / "run" / "logs" / "watchdog_rank_0.txt").read_text()
    assert re.search(rf"rank 0 on .* \(process {first.pid}\) .* phase: rollout ", report)
    assert re.search(r"in all_gather_object, called at .*/collect.py:\d+\n", report)
    assert "not ended: gloo:all_gather number" in report
    assert report in stderr
    assert re.search(rf"exitcode +: {EXIT_CODE} \(pid: {first.pid}\)", stderr)
    until(lambda: not processes_of(job))  # a verifier's worker looks up after a moment


def start_run(root: Path) -> subprocess.Popen[str]:
    """The toy recipe by a random model, which seldom has right and wrong answers to a question."""
    arithmetic.make_model(root / "model", seed=0)
    rows = [{"question": f"{a}+{a}=", "answer": str(a + a)} for a in range(10)]
    (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "recipe.yaml").write_text(RECIPE.format(root=root))
    command = [sys.executable, "-m", "megatron_nft", "train", str(root / "recipe.yaml")]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, process_group=0)


def training_processes(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """Torchrun's children by rank; what those start has their environment."""
    (agent,) = psutil.Process(launcher.pid).children()
    return sorted(agent.children(), key=lambda process: process.environ()["RANK"])


def processes_of(job: str) -> list[psutil.Process]:
    """All that a job of torchrun's has started and that live, whosever children they are by now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TORCHELASTIC_RUN_ID") == job:
                found.append(process)
    return found


def until(is_so: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Wait for something, that a process may have to bring about."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert process is None or process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
