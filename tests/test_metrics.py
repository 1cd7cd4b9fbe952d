import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_nft.config import LoggingConfig
from megatron_nft.metrics import MetricsLog, PhaseTimer, Record, read_metrics

FILE_ONLY = LoggingConfig(tensorboard=False)


def log(run_dir: Path, *records: Record, after: int = -1, tensorboard: bool = False) -> None:
    with MetricsLog(run_dir, LoggingConfig(tensorboard=tensorboard), after) as metrics:
        for record in records:
            metrics.write(record)


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_records_come_back_as_written(tmp_path: Path) -> None:
    records: list[Record] = [
        {"step": 0, "eval/a/accuracy": 0.25},
        {"step": 1, "lr": 1e-6, "loss": None},
    ]
    log(tmp_path / "run", *records)
    assert read_metrics(tmp_path / "run") == records


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, FILE_ONLY, -1) as metrics:
        metrics.write({"step": 3})
        assert read_metrics(tmp_path) == [{"step": 3}]


@pytest.mark.parametrize("tail", [b'{"step": 2, "lo', b'{"step": 2}', b"\x00\x00\x00"])
def test_a_torn_last_line_is_neither_read_nor_kept(tmp_path: Path, tail: bytes) -> None:
    log(tmp_path, {"step": 1})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + tail)
    assert read_metrics(tmp_path) == [{"step": 1}]
    log(tmp_path, {"step": 2, "loss": 0.5}, after=1)
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2, "loss": 0.5}]


@pytest.mark.parametrize("line", ['{"step": 1, "lo', "[1]", '{"loss": 1}'])
def test_a_broken_line_inside_is_an_error(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(tmp_path)


def test_resume_cuts_the_steps_that_come_again(tmp_path: Path) -> None:
    log(tmp_path, *({"step": step, "loss": step / 3} for step in range(6)))
    log(tmp_path, {"step": 3, "loss": -1.0}, after=2)
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3]
    assert [record["loss"] for record in read_metrics(tmp_path)] == [0.0, 1 / 3, 2 / 3, -1.0]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_start_from_scratch_cuts_everything(tmp_path: Path) -> None:
    log(tmp_path, {"step": 0, "eval/a/accuracy": 0.1}, {"step": 1})
    log(tmp_path, {"step": 0, "eval/a/accuracy": 0.2})
    assert read_metrics(tmp_path) == [{"step": 0, "eval/a/accuracy": 0.2}]


@contextmanager
def no_room_behind(file: Path, num_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes more than this one has."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_records_wait_for_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "metrics.jsonl"
    with MetricsLog(tmp_path, LoggingConfig(), -1) as metrics:
        metrics.write({"step": 0, "loss": 0.5})
        with no_room_behind(file, num_bytes=6):
            metrics.write({"step": 1, "loss": 0.25})
            metrics.write({"step": 2, "loss": 0.125})
            with pytest.raises(OSError, match="File too large"):
                metrics.sync()
        assert read_metrics(tmp_path) == [{"step": 0, "loss": 0.5}]  # and six bytes of the next
        metrics.sync()
        assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2]
        metrics.write({"step": 3, "loss": 0.0})
    assert [r.get("loss") for r in read_metrics(tmp_path)] == [0.5, 0.25, 0.125, 0.0]
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert "records that wait in memory: 1" in errors[0]
    assert any("TensorBoard: no more records from step" in error for error in errors)


def test_records_that_found_no_room_until_the_end_are_an_error(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path, FILE_ONLY, -1)
    metrics.write({"step": 0})
    with no_room_behind(tmp_path / "metrics.jsonl", num_bytes=0):
        metrics.write({"step": 1})
        with pytest.raises(OSError, match="File too large"):
            metrics.close()


def test_steps_must_increase(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="step 4 comes after step 4"):
        log(tmp_path, {"step": 4}, after=4)


def test_non_finite_values_are_valid_json_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log(tmp_path, {"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 1e-6, "entropy": None})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "lr": 1e-6,
        "entropy": None,
        "non_finite": 2,
    }
    assert "step 1: not finite: loss, grad_norm" in caplog.text


def test_tensorboard_reads_the_same_scalars(tmp_path: Path) -> None:
    log(
        tmp_path, {"step": 0, "loss": 0.5}, {"step": 7, "loss": -0.25, "lr": None}, tensorboard=True
    )
    assert scalars(tmp_path, "loss") == [(0, 0.5), (7, -0.25)]
    tags = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]
    assert tags == ["loss"]


def test_tensorboard_forgets_the_steps_that_come_again(tmp_path: Path) -> None:
    log(tmp_path, *({"step": step, "loss": 1.0} for step in range(6)), tensorboard=True)
    log(tmp_path, {"step": 3, "loss": 2.0}, after=2, tensorboard=True)
    assert scalars(tmp_path, "loss") == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0)]


def test_tensorboard_shows_what_is_not_finite(tmp_path: Path) -> None:
    log(tmp_path, {"step": 1, "loss": math.nan}, tensorboard=True)
    ((step, value),) = scalars(tmp_path, "loss")
    assert step == 1
    assert math.isnan(value)
    assert scalars(tmp_path, "non_finite") == [(1, 1.0)]


def test_missing_wandb_is_an_error_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"logging\.wandb_project is 'nft'.*pip install"):
        MetricsLog(tmp_path / "run", LoggingConfig(wandb_project="nft"), -1)
    assert not (tmp_path / "run").exists()


def test_phases_add_up_until_reset() -> None:
    timer = PhaseTimer()
    for _ in range(2):
        with timer.phase("rollout"):
            time.sleep(0.02)
    with timer.phase("update"):
        pass
    seconds = timer.seconds()
    assert list(seconds) == ["rollout", "update"]
    assert 0.04 <= seconds["rollout"] < 1
    assert seconds["update"] < 0.02
    timer.reset()
    assert timer.seconds() == {}


def test_phases_are_told_as_they_begin_and_end() -> None:
    told: list[str] = []
    timer = PhaseTimer(told.append)
    with timer.phase("rollout"):
        assert told == ["rollout"]
    with pytest.raises(KeyError), timer.phase("update"):
        raise KeyError
    assert told == ["rollout", "", "update"]  # where it failed


def test_peak_memory_covers_what_the_process_held() -> None:
    held = bytearray(b"x" * 2**28)
    timer = PhaseTimer()
    with timer.phase("update"):
        pass
    assert 0.25 < timer.peak_memory_gib() < 1000
    assert timer.metrics().keys() == {"seconds/update", "peak_memory_gib"}  # no GPU is in use
    del held


def test_a_gpus_memory_is_that_at_the_end_of_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([30, 50, 40])
    cuda = SimpleNamespace(
        synchronize=lambda: None,
        is_initialized=lambda: True,
        mem_get_info=lambda: ((80 - next(used)) * 2**30, 80 * 2**30),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    timer = PhaseTimer()
    for name in ("rollout", "update", "update"):
        with timer.phase(name):
            pass
    found = timer.metrics()
    assert {k: found[k] for k in found if not k.startswith("seconds/")} == {
        "device_gib/rollout": 30,
        "device_gib/update": 50,
        "peak_memory_gib": 50,
    }
    timer.reset()
    assert "device_gib/update" not in timer.metrics()


def test_import_is_light() -> None:
    code = "import sys, megatron_nft.metrics; print({'torch', 'tensorboard'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
