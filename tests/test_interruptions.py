"""Runs that are killed or told to stop, and go on as if nothing had been.

Row 5 of field_failures: the resumed run's numbers are the uninterrupted one's.
"""

import contextlib
import os
import random
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from runs import command, lasting, train
from safetensors.numpy import load_file

pytestmark = [pytest.mark.processes, pytest.mark.alone]
EIGHT = ("rollouts=8", "parallel.tensor=1", "parallel.num_processes=1")


def family_of(run_dir: Path) -> list[psutil.Process]:
    """All processes of a run: the launcher, torchrun, training processes, verifier workers."""
    tops = [p for p in psutil.process_iter() if str(run_dir) in " ".join(_command_line(p))]
    found = {p.pid: p for top in tops for p in [top, *_children(top)]}
    return [p for p in found.values() if p.pid != os.getpid()]


def _command_line(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return process.children(recursive=True)
    return []


def assert_nothing_is_left(family: list[psutil.Process], within_s: float = 40.0) -> None:
    """torchrun gives processes half a minute to end by themselves."""
    _, alive = psutil.wait_procs(family, timeout=within_s)
    left = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert left == [], [_command_line(p) for p in left]


def kill_again_and_again(recipe: Path, run_dir: Path, seed: int, num_kills: int) -> list[str]:
    """Start a run over and over and SIGKILL one of its processes at random; who was killed."""
    rng, victims = random.Random(seed), []
    for _ in range(num_kills):
        started = subprocess.Popen(
            command(recipe, f"run_dir={run_dir}", *EIGHT),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        beginning = time.time()
        config = run_dir / "config.yaml"  # written when everything has started
        while started.poll() is None and not (
            config.exists() and config.stat().st_mtime > beginning
        ):
            time.sleep(0.05)
        time.sleep(rng.uniform(0.0, 4.0))  # a rollout takes about two seconds
        if started.poll() is not None:
            break  # it was faster
        family = family_of(run_dir)
        ranks = [p for p in family if "-u" in _command_line(p)]
        name, victim = rng.choice([("launcher", psutil.Process(started.pid)), ("rank", ranks[0])])
        victims.append(name)
        victim.kill()
        started.wait()
        assert_nothing_is_left(family)
    return victims


def test_a_run_that_is_killed_again_and_again_is_the_run_it_would_have_been(root: Path) -> None:
    """Ten SIGKILLs, in two runs beside each other; nothing is left over."""
    folder, recipe = root / "killed", root / "recipe.yaml"
    through, runs = folder / "through", [folder / "first", folder / "second"]
    train(recipe, f"run_dir={through}", *EIGHT)
    with ThreadPoolExecutor(2) as threads:
        killed = list(threads.map(lambda i: kill_again_and_again(recipe, runs[i], i, 5), range(2)))
        list(threads.map(lambda run: train(recipe, f"run_dir={run}", *EIGHT), runs))
    assert sum(map(len, killed)) >= 8, killed  # a run may have been faster
    for run in runs:
        assert lasting(run) == lasting(through)
        assert_same_weights(run, through)


def test_a_scheduler_s_notice_ends_the_run_so_that_it_goes_on(root: Path) -> None:
    """Of SIGTERM and SIGUSR1, whichever; there is no checkpoint yet but the one it leaves."""
    run_dir = root / "noticed"
    arguments = command(root / "recipe.yaml", f"run_dir={run_dir}", "checkpoint.every=0")
    started = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while started.poll() is None and num_records(run_dir) < 3:  # of the first rollout
        time.sleep(0.02)
    family = family_of(run_dir)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        started.send_signal(number)
    out, _ = started.communicate(timeout=200)
    assert started.returncode == 85, out.decode()
    assert "start it again by the same command" in out.decode()
    assert_nothing_is_left(family)
    assert not (run_dir / "hf").exists()
    train(root / "recipe.yaml", f"run_dir={run_dir}", "checkpoint.every=0")
    assert lasting(run_dir) == lasting(root / "nft")
    assert_same_weights(run_dir, root / "nft")


def assert_same_weights(run_dir: Path, expected: Path) -> None:
    ours, theirs = (load_file(run / "hf" / "model.safetensors") for run in (run_dir, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)


def num_records(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0
