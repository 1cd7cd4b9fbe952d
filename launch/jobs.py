"""What has become of a run that was launched: its jobs, how far it is, what they said."""

import json
import subprocess
import time
from pathlib import Path
from typing import NoReturn

from launch.submit import JOBS_FILE
from megatron_nft.metrics import FILE_NAME, read_metrics

LOOK_EVERY_S = 1.0
SHOWN = ("accuracy_all", "accuracy_kept", "entropy", "loss", "grad_norm")


def status(run_dir: Path) -> int:
    """Print the jobs' states, the last step and the checkpoints; an exit code.

    Raises:
        ValueError: nothing was launched there.
    """
    for name, job in _jobs(run_dir).items():
        print(f"{name}: job {job['id']}, {_state(job['id'])}")
    print(_progress(run_dir))
    found = [p.name for p in (run_dir / "checkpoints").glob("rollout_*")]
    print(f"checkpoints: {', '.join(sorted(found)) or 'none yet'}")
    return 0


def logs(run_dir: Path, name: str, *, num_lines: int = 40, follow: bool = False) -> int:
    """Print the end of what a job's nodes said last; an exit code.

    Raises:
        ValueError: there is no such job, or it has said nothing yet.
    """
    jobs = _jobs(run_dir)
    if name not in jobs:
        raise ValueError(f"there is no job {name!r}; it may be {', '.join(jobs)}")
    folder = Path(jobs[name]["folder"])
    if not (files := _logs_of(folder)):
        raise ValueError(f"{name} has not begun: no log in {folder}")
    read = {file: file.stat().st_size for file in files}
    for file in files[-2:]:  # the batch script's and the nodes'
        said = file.read_bytes()
        said = _whole_lines(said) if follow else said
        read[file] = len(said)
        lines = said.decode(errors="replace").splitlines()[-num_lines:]
        print(f"==> {file}\n" + "\n".join(lines), flush=True)
    if follow:
        _follow(folder, read)
    return 0


def _logs_of(folder: Path) -> list[Path]:
    """The oldest first; a job that is queued again writes further ones."""
    return sorted(folder.glob("*.out"), key=lambda file: file.stat().st_mtime)


def _whole_lines(said: bytes) -> bytes:
    """Up to the last line's end: the rest may stop within a character."""
    return said[: said.rfind(b"\n") + 1]


def _follow(folder: Path, read: dict[Path, int]) -> NoReturn:
    """Print what comes, until Ctrl-C.

    Args:
        read: bytes of each log that were printed already.
    """
    last = None
    while True:
        for file in _logs_of(folder):
            with file.open("rb") as log:
                log.seek(read.get(file, 0))
                if not (more := _whole_lines(log.read())):
                    continue
            read[file] = read.get(file, 0) + len(more)
            if file != last:
                print(f"==> {file}")
            last = file
            print(more.decode(errors="replace"), end="", flush=True)
        time.sleep(LOOK_EVERY_S)


def _jobs(run_dir: Path) -> dict[str, dict[str, str]]:
    file = run_dir / "launch" / JOBS_FILE
    if not file.is_file():
        raise ValueError(f"{run_dir} was not launched from here: there is no {file}")
    return json.loads(file.read_text())


def _state(number: str) -> str:
    """Of Slurm's queue, or of its memory, or of its accounts."""
    for command in (
        ["squeue", "--noheader", "--jobs", number, "--format", "%T %M %r"],
        ["sacct", "--noheader", "--allocations", "--jobs", number, "--format", "State,ExitCode"],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0 and done.stdout.strip():
            return " ".join(done.stdout.split())
    return "unknown to Slurm (ended long ago, or this is no login node)"


def _progress(run_dir: Path) -> str:
    records = read_metrics(run_dir) if (run_dir / FILE_NAME).is_file() else []
    if not records:
        return "no step yet"
    last = records[-1]
    known = {k: v for record in records for k, v in record.items() if k.endswith("/accuracy")}
    shown = {k: last[k] for k in SHOWN if last.get(k) is not None} | known
    numbers = ", ".join(f"{key} {value:.4g}" for key, value in shown.items())
    return f"rollout {last.get('rollout', 0)}, step {last['step']}: {numbers}"
