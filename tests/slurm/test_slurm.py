"""`megatron-nft launch` on a real Slurm: told to stop, killed, and done all the same; over SSH.

Row 19 of field_failures as well: a node that does not come is named within a deadline.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cluster import Slurm, trouble
from login import Login
from login import trouble as login_trouble
from runs import lasting, prepare_model, train
from safetensors.numpy import load_file

REPOSITORY = Path(__file__).parents[2]
LAUNCHER = REPOSITORY / ".venv-launch" / "bin" / "megatron-nft"
WHY_NOT = trouble() or (None if LAUNCHER.exists() else "there is no .venv-launch")
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]
CLUSTER = """
workdir: {workdir}
program: {program}
gpus_per_node: 0
partition: batch
time: 00:15:00
notice_s: 120
start_timeout_s: 90
health: {{timeout_s: {patience}}}
"""
SILENT = """#!/bin/sh
[ "$1 $SLURMD_NODENAME" = "node-check node1" ] && sleep 300
exec {program} "$@"
"""
LONG = ("rollouts=80", "evaluate.every=20", "checkpoint.every=2", "optimizer.lr=1e-5")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Slurm(tmp_path_factory.mktemp("slurm"), num_nodes=3) as slurm:
        yield slurm


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with relative paths, a model that has seen sums, a cluster file."""
    workdir = tmp_path_factory.mktemp("work")
    prepare_model(workdir)
    recipe = (workdir / "recipe.yaml").read_text().replace(f"{workdir}/", "")
    recipe = recipe.replace("run_dir: nft", "run_dir: runs/slurm")
    (workdir / "recipe.yaml").write_text(recipe)
    program = REPOSITORY / ".venv" / "bin" / "megatron-nft"
    (workdir / "silent").write_text(SILENT.format(program=program))
    (workdir / "silent").chmod(0o755)
    for name, started, patience in (("cluster", program, 120), ("hasty", "silent", 40)):
        text = CLUSTER.format(workdir=workdir, program=started, patience=patience)
        (workdir / f"{name}.yaml").write_text(text)
    return workdir


def launch(slurm: Slurm, workdir: Path, *words: str) -> dict[str, str]:
    """The jobs' numbers by name."""
    command = [str(LAUNCHER), "launch", "recipe.yaml", *words]
    done = subprocess.run(
        command, cwd=workdir, env=slurm.environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split(": job ") for line in done.stdout.splitlines() if ": job " in line]
    return dict(lines)


def until(is_so: Callable[[], bool], within_s: float, slurm: Slurm) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, (slurm.jobs(), slurm.states())
        time.sleep(0.2)


def num_records(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_a_run_that_is_told_to_stop_and_loses_a_node_is_the_run_it_would_have_been(
    slurm: Slurm, workdir: Path
) -> None:
    jobs = launch(slurm, workdir, "--cluster", "cluster.yaml", "--nodes", "2", *LONG)
    run_dir, number = workdir / "runs" / "slurm", jobs["train"]

    def restarts() -> int:
        return int(slurm.job(number)["Restarts"])

    def wait_for_progress() -> None:
        start = num_records(run_dir)
        until(lambda: num_records(run_dir) > start + 4, 300, slurm)

    wait_for_progress()
    minutes = int(slurm.run("squeue", "--noheader", "--jobs", number, "-o", "%M")[:-3]) + 2
    slurm.run("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}")  # notice is due
    until(lambda: restarts() == 1, 100, slurm)
    slurm.run("scontrol", "update", f"JobId={number}", "TimeLimit=15")
    wait_for_progress()
    before = restarts()
    slurm.run("scancel", "--signal=USR1", number)
    until(lambda: restarts() > before, 60, slurm)
    wait_for_progress()
    before = restarts()
    assert slurm.job(number)["NodeList"] == "node[1-2]"
    slurm.kill_node("node2")
    until(lambda: restarts() > before, 100, slurm)
    assert slurm.wait_for(number, ("COMPLETED", "FAILED"), 400)["JobState"] == "COMPLETED"
    assert slurm.wait_for(jobs["evaluate"], ("COMPLETED", "FAILED"), 150)["JobState"] == "COMPLETED"
    assert_as_uninterrupted(workdir, run_dir)
    assert_is_told(slurm, run_dir)
    slurm.start_node("node2")


def assert_as_uninterrupted(workdir: Path, run_dir: Path) -> None:
    """The same run on this machine, two processes of one node."""
    with_paths = [f"run_dir={workdir}/through", f"model.path={workdir}/cold/hf"]
    with_paths += [f"data.train[0].path={workdir}/cold.jsonl"]
    with_paths += [f"evaluate.sets[{i}].path={workdir}/cold.jsonl" for i in range(2)]
    train(workdir / "recipe.yaml", *with_paths, *LONG)
    assert lasting(run_dir) == lasting(workdir / "through")
    ours, theirs = (
        load_file(run / "hf" / "model.safetensors") for run in (run_dir, workdir / "through")
    )
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    last = [r for r in lasting(run_dir) if "eval/sums/accuracy" in r][-1]
    [file] = (run_dir / "evaluation").glob("*/metrics.jsonl")
    found = json.loads(file.read_text())
    assert found["eval/sums/accuracy"] == last["eval/sums/accuracy"]  # of the same weights


def said(slurm: Slurm, *words: str) -> str:
    """What the command prints on the login node."""
    command = [str(LAUNCHER), *words]
    done = subprocess.run(command, env=slurm.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_is_told(slurm: Slurm, run_dir: Path) -> None:
    status = said(slurm, "status", str(run_dir))
    assert "COMPLETED" in status
    assert "rollout 80" in status
    assert "sums" in said(slurm, "logs", str(run_dir), "--job", "evaluate")
    whole = said(slurm, "logs", str(run_dir), "--lines", "5000")
    assert whole.count("\nmegatron-nft: told to stop; queued again") == 2
    assert whole.count("\nmegatron-nft: failed") <= 1  # the other node may see it before Slurm does


@pytest.fixture
def login(slurm: Slurm, tmp_path: Path) -> Iterator[Login | None]:
    """None where there is no sshd, or none that lets root in."""
    if login_trouble():
        yield None
        return
    with Login(tmp_path, slurm) as login:
        yield None if login.refusal() else login


@pytest.fixture
def elsewhere(workdir: Path, login: Login | None) -> Path:
    """A folder to launch from over SSH, where that can be; else `workdir` itself."""
    if login is None:
        return workdir
    shutil.copy(workdir / "recipe.yaml", login.folder)
    hasty = (workdir / "hasty.yaml").read_text()
    (login.folder / "hasty.yaml").write_text(hasty + login.ssh)
    return login.folder


def test_a_node_that_is_not_well_is_left_out(slurm: Slurm, workdir: Path, elsewhere: Path) -> None:
    """node1 does not answer before the run begins; of the others one trains, and one serves."""
    until(lambda: set(slurm.states().values()) == {"idle"}, 60, slurm)
    words = ["--cluster", "hasty.yaml", "--nodes", "1", "--servers", "1", "run_dir=runs/ill"]
    words += ["rollouts=1", "rollout.engine=remote", "parallel.tensor=1"]
    jobs = launch(slurm, elsewhere, *words)
    number = jobs["train"]
    until(lambda: slurm.job(number)["ExcNodeList"] == "node1", 90, slurm)
    assert slurm.wait_for(number, ("COMPLETED", "FAILED"), 200)["JobState"] == "COMPLETED"
    assert slurm.job(number)["NodeList"] == "node[2-3]"
    assert "rollout 1, step 2" in said(slurm, "status", str(workdir / "runs" / "ill"))
    assert "rollout" in said(slurm, "logs", str(workdir / "runs" / "ill"))
    assert not (workdir / "runs" / "ill" / "logs" / "engine_0.log").exists()  # none of its own
    assert slurm.wait_for(jobs["evaluate"], ("COMPLETED", "FAILED"), 150)["JobState"] == "COMPLETED"


def test_a_login_node_that_lets_nobody_in_is_told_of(
    slurm: Slurm, elsewhere: Path, login: Login | None
) -> None:
    if login is None:
        pytest.skip(login_trouble() or "sshd does not let root in here")

    def refused(before: str, after: str) -> str:
        text = (elsewhere / "hasty.yaml").read_text()
        (elsewhere / "bad.yaml").write_text(text.replace(before, after))
        command = [str(LAUNCHER), "launch", "recipe.yaml", "--cluster", "bad.yaml"]
        done = subprocess.run(
            [*command, "--nodes", "2", "run_dir=runs/bad"],
            cwd=elsewhere,
            env=slurm.environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 2
        return done.stderr

    assert "ssh.host 127.0.0.1: root@127.0.0.1: Permission denied" in refused("/me,", "/host,")
    assert "ssh.host 127.0.0.1: " in refused(f"port: {login.port}", "port: 1")
    assert "cannot create directory" in refused("workdir: ", "workdir: /proc/x #")
