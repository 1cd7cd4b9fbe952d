"""The command `megatron-nft train` with vLLM servers: in turns, ahead, in flight, resumed."""

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from runs import command, lasting, train

from megatron_nft.metrics import read_metrics

pytestmark = [pytest.mark.processes, pytest.mark.alone]
REMOTE = ["rollout.engine=remote", "parallel.tensor=1", "evaluate.every=2"]
AHEAD = [*REMOTE, "old_logp=rollout", "rollout.max_steps_off_policy=1"]
LEARNED = ("loss", "grad_norm", "entropy", "tokens_sampled", "accuracy_all", "accuracy_kept")


def assert_same(found: list[dict], expected: list[dict], rel: float, abs: float = 1e-6) -> None:
    assert [r["step"] for r in found] == [r["step"] for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for key in theirs.keys() & {*LEARNED, "eval/sums/accuracy"}:
            assert ours[key] == pytest.approx(theirs[key], rel=rel, abs=abs), (ours["step"], key)


def of_rollouts(run_dir: Path, key: str) -> list[float]:
    return [record[key] for record in read_metrics(run_dir) if key in record]


def test_in_turns_a_run_with_servers_is_the_run_with_engines_of_its_own(
    root: Path,
) -> None:
    own, remote = root / "own", root / "remote"
    train(root / "recipe.yaml", f"run_dir={own}", "parallel.tensor=1")
    train(root / "recipe.yaml", f"run_dir={remote}", *REMOTE, "rollout.num_servers=2")
    assert_same(lasting(remote), lasting(own), rel=0, abs=0)  # to the bit: the same answers
    first, second = (run / "hf" / "model.safetensors" for run in (own, remote))
    assert first.read_bytes() == second.read_bytes()
    assert set(of_rollouts(remote, "steps_off_policy_max")) == {0}
    assert max(of_rollouts(remote, "logp_delta_max")) <= 1e-4
    assert max(of_rollouts(remote, "probe_delta_max")) <= 1e-4
    assert of_rollouts(remote, "weights_version") == [0, 2, 4]  # the last ones of each rollout
    assert (remote / "logs" / "engine_1.log").is_file()


def test_sampling_ahead_is_one_rollout_old_and_resumes(root: Path) -> None:
    through, resumed = root / "ahead", root / "ahead-resumed"
    recorded = "logging.answers_every=1"
    train(root / "recipe.yaml", f"run_dir={through}", *AHEAD, recorded)
    assert of_rollouts(through, "steps_off_policy_max") == [0, 1, 1, 1]
    assert of_rollouts(through, "steps_off_policy_mean") == [0, 1, 1, 1]
    for rollout, version in ((1, 0), (2, 0), (3, 1), (4, 2)):  # the first two before any update
        rows = pq.read_table(through / "rollouts" / f"rollout_{rollout}.parquet").to_pylist()
        assert {row["version"] for row in rows} == {version}
        assert {row["verdict"] for row in rows} == {"correct", "wrong"}
    shutil.copytree(through, resumed)  # as if it had been killed after its third checkpoint
    shutil.rmtree(resumed / "checkpoints" / "rollout_4")
    assert (resumed / "checkpoints" / "rollout_3" / "sampling" / "ahead_3.parquet").is_file()
    train(root / "recipe.yaml", f"run_dir={resumed}", *AHEAD, recorded)
    assert_same(lasting(resumed), lasting(through), rel=1e-3)  # engines round as batches fall


def notice_after(num_records: int, run_dir: Path, *arguments: str) -> None:
    """A run with servers is told to stop, and does so without waiting for what they sample."""
    started = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    file = run_dir / "metrics.jsonl"
    while started.poll() is None and not (
        file.exists() and file.read_bytes().count(b"\n") >= num_records
    ):
        time.sleep(0.02)
    started.send_signal(signal.SIGTERM)
    out, _ = started.communicate(timeout=120)
    assert started.returncode == 85, out.decode()
    assert len(list((run_dir / "checkpoints").glob("rollout_?"))) >= 1
    assert not (run_dir / "hf").exists()


def test_weights_in_flight_and_a_scheduler_s_notice(root: Path) -> None:
    run_dir = root / "in-flight"
    changed = ["rollout.in_flight_updates=true", "rollout.max_steps_off_policy=2"]
    changed += ["rollout.weight_transfer=gloo"]
    arguments = [f"run_dir={run_dir}", *AHEAD[:-1], *changed]
    notice_after(4, run_dir, *command(root / "recipe.yaml", *arguments))
    train(root / "recipe.yaml", *arguments)
    records = read_metrics(run_dir)
    assert [r["step"] for r in records] == list(range(9))
    steps = of_rollouts(run_dir, "steps_off_policy_max")
    assert steps[:2] == [0, 1]  # both asked for before any update
    assert max(steps) <= 2
    assert max(of_rollouts(run_dir, "probe_delta_max")) <= 1e-4


def test_a_run_that_fails_while_it_samples_ahead_ends_with_all_it_started(
    root: Path,
) -> None:
    run_dir = root / "failing"
    changed = ["rollout.in_flight_updates=true", "rollout.max_steps_off_policy=2"]
    changed += ["optimizer.lr=1e30", "evaluate.every=0"]  # no number is left after one update
    changed += ["optimizer.max_skipped_steps=0"]
    arguments = command(root / "recipe.yaml", f"run_dir={run_dir}", *AHEAD[:-1], *changed)
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "FloatingPointError" in done.stderr
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(run_dir) not in lines
    assert not (run_dir / "engine" / "weights").exists()
