"""The whole step beside TRL's GRPOTrainer: one machine, one model, the same prompts and batch.

    .venv/bin/python benchmarks/end_to_end.py                    # 0.5M and 25M parameters
    .venv/bin/python benchmarks/end_to_end.py --sizes 0.5M       # minutes
    .venv/bin/python benchmarks/end_to_end.py --quick            # ours alone, a toy

A step: 1,024 answers (64 questions × 16), temperature 1, judged; one AdamW step over all of them,
clipped surrogate, mean over tokens, no KL term, float32. The prompts are the demo's sums. The model
was taught (benchmarks/pupil.py) to answer with up to 28 tokens, the end of text among them, half of
them right: practically every group has right and wrong answers, so that both programs train on
every answer; the table says on how many tokens. The larger model gives the same probabilities as
the smaller one. There are two kinds of lengths, and the choice between them decides much:

fixed        every answer has 28 tokens; who pads loses nothing, who does not gains nothing
varied       4 to 28 tokens, all lengths equally likely: TRL samples and trains padded batches,
             all as long as the longest; vLLM and our packed rows hold no padding

tokens/s counts sampled tokens (the end of text included, padding not) over the time from one step's
record in the log to the next one's, on both sides.

Ours is `megatron-nft train` with objective grpo, one vLLM engine a process, the engine's
log-probabilities as the old ones (TRL takes those of its only forward pass as the old ones too).
TRL samples with transformers' generate (vLLM, which it may use on GPUs, is not for CPUs there); it
runs in every layout of `--trl-processes`, the threads dividing the cores, and the best one counts.
The first run makes an environment for it, in the user's cache or in --environment.

Programs take turns, each in processes of its own; the first two steps of a turn do not count.
"CPU s" is the CPU time of all of a program's processes a step: it sees less of who else is there.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pupil
import torch
import yaml

from megatron_nft.arithmetic import make_model

ROOT = Path(__file__).parents[1]
TRL = "trl==1.16.0"
WARM_UP, GOAL, SEED, LR = 2, 1.5, 0, 1e-6
LEARNING_STEPS = 100
# hidden size, intermediate size, layers; None: the demo's model as it is
SIZES = {"0.5M": None, "25M": (512, 1536, 8)}


@dataclass(frozen=True)
class Work:
    """What both programs are to do."""

    model: Path
    data: Path
    questions: int
    steps: int
    group: int = 16

    @property
    def answers(self) -> int:
        return self.questions * self.group


@dataclass(frozen=True)
class Program:
    """One way to do it: whose, in how many processes."""

    name: str
    processes: int
    settings: tuple[str, ...] = ()  # ours: of the recipe; TRL's: its interpreter, options

    @property
    def is_ours(self) -> bool:
        return self.name == "megatron-nft"


@dataclass(frozen=True)
class Step:
    seconds: float
    cpu_seconds: float
    record: dict[str, Any]


# the two programs


def recipe(work: Work, program: Program, directory: Path) -> dict[str, Any]:
    return {
        "run_dir": str(directory),
        "rollouts": work.steps,
        "model": {"path": str(work.model), "dtype": "float32"},
        "parallel": {"num_processes": program.processes},
        "data": {
            "train": [{"path": str(work.data)}],
            "template": "raw",
            "max_prompt_tokens": 10,
        },
        "objective": {"name": "grpo"},
        "old_logp": "rollout",
        "rollout": {
            "questions": work.questions,
            "questions_asked": work.questions,
            "max_asks": 1,
            "answers": work.group,
            "max_response_tokens": pupil.ANSWER_TOKENS,
            "max_sequences": 512,
        },
        "optimizer": {
            "lr": LR,
            "weight_decay": 0.0,
            "warmup_rollouts": 0,
            "questions_per_minibatch": work.questions,
            "tokens_per_microbatch": 1024,  # activations that fit a cache
        },
        "evaluate": {"every": 0},
        "checkpoint": {"every": 0},
        "logging": {"tensorboard": False},
    }


def our_command(work: Work, program: Program, directory: Path) -> list[str]:
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(work, program, directory)))
    return [sys.executable, "-m", "megatron_nft", "train", str(path), *program.settings]


def trl_command(work: Work, program: Program, directory: Path) -> list[str]:
    python, *settings = program.settings
    command = [python]
    if program.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(program.processes)]
    command += [str(ROOT / "benchmarks" / "trl_step.py"), *settings]
    command += ["--model", str(work.model), "--data", str(work.data)]
    command += ["--records", str(directory / "metrics.jsonl"), "--steps", str(work.steps)]
    command += ["--answers", str(work.answers), "--group", str(work.group)]
    return [*command, "--max-tokens", str(pupil.ANSWER_TOKENS), "--lr", str(LR)]


def turn(work: Work, program: Program) -> list[Step]:
    """One run of the program; its steps after the first ones."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make = our_command if program.is_ours else trl_command
        threads = max(1, len(os.sched_getaffinity(0)) // program.processes)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        environment |= {"TOKENIZERS_PARALLELISM": "false"}
        with (directory / "output").open("w+") as output:
            process = subprocess.Popen(
                make(work, program, directory),
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            arrivals = list(watch(process, directory / "metrics.jsonl"))
            if process.returncode or len(arrivals) < work.steps:
                output.seek(0)
                raise RuntimeError(f"{program.name} failed:\n{output.read()[-4000:]}")
    counted = zip(arrivals[WARM_UP - 1 :], arrivals[WARM_UP:], strict=False)
    return [Step(b[0] - a[0], b[1] - a[1], b[2]) for a, b in counted]


def watch(process: subprocess.Popen, log: Path) -> Iterator[tuple[float, float, dict[str, Any]]]:
    """When each record came into the log, the CPU time until then, and the record."""
    size = num_read = 0
    while process.poll() is None:
        time.sleep(0.01)
        if not log.exists() or log.stat().st_size == size:
            continue
        now, cpu_seconds, size = (
            time.perf_counter(),
            cpu_seconds_of(process.pid),
            log.stat().st_size,
        )
        for line in log.read_text().splitlines()[num_read:]:
            num_read += 1
            yield now, cpu_seconds, json.loads(line)


def cpu_seconds_of(pid: int) -> float:
    """Of a process and those that it started and that live."""
    root = psutil.Process(pid)
    total = 0.0
    for process in (root, *root.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # ended since it was listed
            times = process.cpu_times()
            total += times.user + times.system
    return total


# TRL's environment


def environment(directory: Path) -> str:
    """The interpreter of an environment with TRL; made where there is none."""
    python, stamp = directory / "bin" / "python", directory / ".complete"
    if stamp.exists():
        return str(python)
    bundled = ROOT / ".bootstrap" / "uv" / "bin" / "uv"
    uv = shutil.which("uv") or str(bundled)
    if not Path(uv).exists():
        raise RuntimeError("no uv on the PATH, nor the one that launch/setup/bootstrap.sh installs")
    print(f"installing {TRL} into {directory}", file=sys.stderr)
    shutil.rmtree(directory, ignore_errors=True)
    subprocess.run([uv, "venv", "-q", "--no-project", "-p", sys.executable, directory], check=True)
    install = [uv, "pip", "install", "-q", "--python", str(python)]
    wanted = [TRL, f"torch=={torch.__version__.split('+')[0]}"]
    settings = uv_settings()
    # as launch/setup/bootstrap.sh does: torch's CPU build if it can be reached, else the usual one
    small = settings | {"UV_HTTP_TIMEOUT": "10", "UV_HTTP_RETRIES": "0"}
    command = [*install, "--torch-backend", "cpu", *wanted]
    if subprocess.run(command, env=small, stderr=subprocess.DEVNULL).returncode:
        subprocess.run([*install, *wanted], env=settings, check=True)
    stamp.touch()
    return str(python)


def uv_settings() -> dict[str, str]:
    """The environment, with settings meant for pip said to uv."""
    found = dict(os.environ) | {"UV_PYTHON_DOWNLOADS": "never"}
    links = [s for s in found.get("PIP_FIND_LINKS", "").split() if "://" in s or Path(s).is_dir()]
    if links:
        found.setdefault("UV_FIND_LINKS", ",".join(links))
    if "PIP_INDEX_URL" in found:
        found.setdefault("UV_DEFAULT_INDEX", found["PIP_INDEX_URL"])
    return found


# models, turns, tables


def prepare(directory: Path, sizes: Sequence[str], is_varied: bool) -> None:
    """The data, and a model of each size."""
    questions = pupil.write_questions(directory / "train.jsonl", SEED)
    small = directory / "0.5M"
    make_model(small, SEED)
    pupil.teach(small, questions, SEED, LEARNING_STEPS, is_varied)
    for size in sizes:
        if SIZES[size]:
            pupil.grow(small, directory / size, *SIZES[size])


def measure(work: Work, programs: Sequence[Program], turns: int) -> dict[Program, list[Step]]:
    found: dict[Program, list[Step]] = {program: [] for program in programs}
    for number in range(turns):
        for program in programs:
            steps = turn(work, program)
            found[program] += steps
            shown = ", ".join(f"{step.seconds:.2f}" for step in steps)
            print(f"turn {number + 1}, {label(program)}: {shown} s", file=sys.stderr, flush=True)
    return found


def label(program: Program) -> str:
    return f"{described(program)} ({program.processes} processes)"


def described(program: Program) -> str:
    options = program.settings if program.is_ours else program.settings[1:]
    return " ".join((program.name, *options))


def speed(steps: Sequence[Step]) -> float:
    """Sampled tokens a second, the median."""
    return statistics.median(step.record["tokens_sampled"] / step.seconds for step in steps)


def table(size: str, work: Work, found: dict[Program, list[Step]]) -> str:
    columns = "size", "program", "processes", "answers/step", "tokens/step", "trained on"
    columns += "s/step", "least–most", "CPU s", "tokens/s", "× TRL's best"
    lines = ["| " + " | ".join(columns) + " |", "|---" * 2 + "|---:" * (len(columns) - 2) + "|"]
    best = max((speed(s) for p, s in found.items() if not p.is_ours), default=None)
    for program, steps in found.items():
        seconds = [step.seconds for step in steps]
        cells = [size, described(program), program.processes, f"{work.answers:,}"]
        cells += [f"{typical(steps, key):,.0f}" for key in ("tokens_sampled", "tokens_trained")]
        cells += [f"{statistics.median(seconds):.2f}", f"{min(seconds):.2f}–{max(seconds):.2f}"]
        cells += [f"{statistics.median(step.cpu_seconds for step in steps):.2f}"]
        cells += [f"{speed(steps):,.0f}", f"{speed(steps) / best:.2f}" if best else "–"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def typical(steps: Sequence[Step], key: str) -> float:
    return statistics.median(step.record.get(key, 0.0) for step in steps)


def phases(found: dict[Program, list[Step]]) -> str:
    """Where our step's time goes; "between" is what no phase counts."""
    ours = {program: steps for program, steps in found.items() if program.is_ours}
    keys = sorted({k for s in ours.values() for k in s[0].record if k.startswith("seconds/")})
    names = [key.removeprefix("seconds/") for key in keys]
    lines = ["| ours, s/step | " + " | ".join([*names, "between"]) + " |"]
    lines.append("|---" + "|---:" * (len(keys) + 1) + "|")
    for program, steps in ours.items():
        spent = [typical(steps, key) for key in keys]
        spent.append(statistics.median(s.seconds - sum(map(s.record.get, keys)) for s in steps))
        lines.append(f"| {label(program)} | " + " | ".join(f"{s:.2f}" for s in spent) + " |")
    return "\n".join(lines)


def verdict(size: str, found: dict[Program, list[Step]]) -> str:
    ours, theirs = (
        max(speed(steps) for program, steps in found.items() if program.is_ours is is_ours)
        for is_ours in (True, False)
    )
    met = "met" if ours >= GOAL * theirs else "NOT met"
    return f"{size}: {ours / theirs:.2f} × TRL's best tokens/s, goal {GOAL}: {met}"


def arguments() -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cores = len(os.sched_getaffinity(0))
    add = parser.add_argument
    add("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    add("--lengths", nargs="+", choices=["fixed", "varied"], default=["fixed", "varied"])
    add("--turns", type=int, default=2)
    add("--steps", type=int, default=3, help="measured ones, a turn")
    add("--processes", type=int, default=cores, help="ours, data parallel")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of our recipe")
    add("--trl-processes", type=int, nargs="+", default=sorted({1, cores}))
    add("--trl-micro-batch", type=int, nargs="+", default=[1024], help="answers of each process")
    add("--environment", type=Path, default=cache / "megatron-nft" / TRL.replace("==", "-"))
    add("--skip-trl", action="store_true")
    add("--quick", action="store_true", help="ours alone, a toy's two steps")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.quick:
        args.sizes, args.lengths, args.skip_trl = ["0.5M"], ["varied"], True
        args.turns = args.steps = 1
    programs = [Program("megatron-nft", args.processes, tuple(args.set))]
    if not args.skip_trl:
        python = environment(args.environment)
        programs += [
            Program("TRL", processes, (python, f"--micro-batch={size}"))
            for processes in args.trl_processes
            for size in args.trl_micro_batch
        ]
    for lengths in args.lengths:
        with tempfile.TemporaryDirectory() as name:
            prepare(Path(name), args.sizes, lengths == "varied")
            for size in args.sizes:
                compare(size, lengths, Path(name), programs, args)


def compare(
    size: str, lengths: str, directory: Path, programs: Sequence[Program], args: argparse.Namespace
) -> None:
    questions, data = 8 if args.quick else 64, directory / "train.jsonl"
    work = Work(directory / size, data, questions, WARM_UP + args.steps)
    found = measure(work, programs, args.turns)
    print(f"\n## {size} parameters, {lengths} lengths\n")
    print(f"{table(size, work, found)}\n\n{phases(found)}\n", flush=True)
    if not args.skip_trl:
        print(verdict(f"{size}, {lengths}", found), flush=True)


if __name__ == "__main__":
    main()
