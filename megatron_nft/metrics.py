"""A run's numbers: one JSON object a step, mirrored to TensorBoard and Weights & Biases."""

import json
import logging
import math
import os
import resource
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Protocol, Self

from omegaconf import OmegaConf

from megatron_nft.config import LoggingConfig
from megatron_nft.notice import unheard

FILE_NAME = "metrics.jsonl"
NON_FINITE = "non_finite"  # how many of a record's values were NaN or infinite
GIB = 2**30

Record = dict[str, float | int | None]

logger = logging.getLogger(__name__)


class MetricsLog:
    """Append-only log of a run, for one process of the run to hold.

    `metrics.jsonl` is the record; what follows `resume_after_step` in it (-1: everything) is cut
    off, because the resumed run writes those steps again. Records carry an increasing "step".

    A full disk ends no run: records wait in memory until there is room, and a mirror that fails is
    given up. `close` raises OSError where records are left.
    """

    def __init__(self, run_dir: Path, config: LoggingConfig, resume_after_step: int) -> None:
        wandb = _import_wandb(config.wandb_project) if config.wandb_project else None
        run_dir.mkdir(parents=True, exist_ok=True)
        _cut(run_dir / FILE_NAME, resume_after_step)
        self._last_step = resume_after_step
        self._mirrors: list[_Mirror] = []
        if config.tensorboard:
            self._mirrors.append(_TensorBoard(run_dir / "tensorboard", resume_after_step))
        if wandb:
            self._mirrors.append(_WeightsAndBiases(wandb, run_dir, config))
        self._file = (run_dir / FILE_NAME).open("ab", buffering=0)
        self._unwritten = b""

    def write(self, record: Record) -> None:
        """Append one record; NaN and infinity become null, and `non_finite` counts them."""
        step = record["step"]
        assert isinstance(step, int), f"step {step!r} is not a whole number"
        assert step > self._last_step, f"step {step} comes after step {self._last_step}"
        bad = [k for k, v in record.items() if v is not None and not math.isfinite(v)]
        if bad:
            logger.warning("step %d: not finite: %s", step, ", ".join(bad))
            record = record | {NON_FINITE: len(bad)}
        finite = record | dict.fromkeys(bad)
        self._unwritten += (json.dumps(finite, allow_nan=False) + "\n").encode()
        try:
            self._flush()
        except OSError as error:
            waiting = self._unwritten.count(b"\n")
            logger.error("%s; make room, records that wait in memory: %d", error, waiting)
        self._last_step = step
        present = {k: v for k, v in record.items() if v is not None}
        for mirror in list(self._mirrors):
            self._mirror(mirror, step, present)

    def sync(self) -> None:
        """Wait until the disk has all records; raises OSError where it takes them not."""
        self._flush()
        os.fsync(self._file.fileno())

    def leave_unwritten(self) -> None:
        """Forget what finds no room: a resumed run writes it again."""
        try:
            self._flush()
        except OSError as error:
            logger.error("%s; the resumed run will write %d bytes", error, len(self._unwritten))
            self._unwritten = b""

    def _flush(self) -> None:
        while self._unwritten:  # one call a record: a kill tears the last line at most
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def _mirror(self, mirror: "_Mirror", step: int, present: dict[str, float | int]) -> None:
        try:
            mirror.write(step, present)
        except OSError as error:
            logger.error("%s: no more records from step %d on: %s", mirror.name, step, error)
            self._mirrors.remove(mirror)

    def close(self, failed: bool = False) -> None:
        try:
            self._flush()
        finally:
            self._file.close()
            for mirror in self._mirrors:
                self._close_mirror(mirror, failed)

    def _close_mirror(self, mirror: "_Mirror", failed: bool) -> None:
        try:
            mirror.close(failed)
        except OSError as error:
            logger.error("%s: its last records were not written: %s", mirror.name, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)


def read_metrics(run_dir: Path) -> list[Record]:
    """All complete lines of a run's log; a last line without its newline is not one."""
    path = run_dir / FILE_NAME
    complete = path.read_bytes().split(b"\n")[:-1]
    return [_parse(line, path, number) for number, line in enumerate(complete, 1)]


class PhaseTimer:
    """Seconds and a GPU's memory of each named phase since the last reset; phases do not nest.

    Args:
        on_change: told a phase's name when it begins and "" when it ends, unless it raises.
    """

    def __init__(self, on_change: Callable[[str], object] = lambda _: None) -> None:
        self._seconds: dict[str, float] = {}
        self._gib: dict[str, float] = {}
        self._on_change = on_change

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block, with the GPU work it started. A block that raises is not counted."""
        self._on_change(name)
        start = time.perf_counter()
        yield
        if torch := _torch_on_cuda():
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info()
            self._gib[name] = max(self._gib.get(name, 0.0), (total - free) / GIB)
        self._on_change("")
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        return dict(self._seconds)

    def peak_memory_gib(self) -> float:
        """What was in use of the GPU, by whomever, at the end of a phase: the most of its ends.

        torch keeps what it frees, so that this is about the phases' peak. (Its own count is not:
        it goes on counting the memory that vLLM gives back by other ways.) On a CPU host what the
        process held at most since its start.
        """
        if self._gib:
            return max(self._gib.values())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / GIB if sys.platform == "darwin" else peak / 2**20  # bytes there, KiB on Linux

    def metrics(self) -> dict[str, float]:
        """seconds/ and, where a GPU is used, device_gib/ of every phase; peak_memory_gib."""
        found = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        found |= {f"device_gib/{name}": gib for name, gib in self._gib.items()}
        return found | {"peak_memory_gib": self.peak_memory_gib()}

    def reset(self) -> None:
        self._seconds.clear()
        self._gib.clear()


class _Mirror(Protocol):
    """Another place for the same numbers; values are present but may be NaN or infinite."""

    name: str

    def write(self, step: int, values: dict[str, float | int]) -> None: ...
    def close(self, failed: bool) -> None: ...


class _TensorBoard:
    """Scalars by tensorboard's own event writer, which needs no torch."""

    name = "TensorBoard"

    def __init__(self, directory: Path, resume_after_step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(directory))
        # Readers hide what earlier files hold from the step of a session's START on.
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step=resume_after_step + 1, session_log=restart)

    def write(self, step: int, values: dict[str, float | int]) -> None:
        scalars = [
            self._summary.Value(tag=key, simple_value=value)
            for key, value in values.items()
            if key != "step"
        ]
        self._add(step=step, summary=self._summary(value=scalars))

    def _add(self, **content: object) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), **content))
        self._writer.flush()

    def close(self, failed: bool) -> None:
        del failed  # TensorBoard has no such notion
        self._writer.close()


class _WeightsAndBiases:
    """One W&B run for the life of the run directory; WANDB_MODE=offline works as ever.

    W&B ignores steps that it already has, and a resumed run repeats the same numbers.
    """

    name = "Weights & Biases"

    def __init__(self, wandb: ModuleType, run_dir: Path, config: LoggingConfig) -> None:
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        recipe = run_dir / "config.yaml"
        held = OmegaConf.to_container(OmegaConf.load(recipe)) if recipe.exists() else None
        with unheard(signal.SIGUSR1):  # it starts a process, which the notice would end
            self._run = wandb.init(
                project=config.wandb_project,
                name=config.wandb_name or None,
                id=id_file.read_text(),
                resume="allow",
                dir=str(run_dir),
                config=held,
            )

    def write(self, step: int, values: dict[str, float | int]) -> None:
        self._run.log(values, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _import_wandb(project: str) -> ModuleType:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ValueError(
            f"logging.wandb_project is {project!r}, but wandb is not installed: "
            "pip install 'megatron-nft[wandb]', or leave logging.wandb_project empty"
        ) from error
    return wandb


def _cut(path: Path, last_step: int) -> None:
    """Drop the steps after `last_step` and a torn last line, all at once or not at all."""
    if not path.exists():
        return
    kept = [r for r in read_metrics(path.parent) if r["step"] <= last_step]
    content = "".join(json.dumps(record) + "\n" for record in kept).encode()
    if content == path.read_bytes():
        return
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _parse(line: bytes, path: Path, number: int) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not JSON: {line[:80]!r}") from error
    if not isinstance(record, dict) or "step" not in record:
        raise ValueError(f'{path}, line {number}: not an object with "step": {line[:80]!r}')
    return record


def _torch_on_cuda() -> ModuleType | None:
    """The torch module, if this process has loaded it and uses a GPU; never imports it."""
    torch = sys.modules.get("torch")
    return torch if torch and torch.cuda.is_initialized() else None
