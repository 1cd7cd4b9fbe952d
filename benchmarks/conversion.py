"""Converting a checkpoint of random numbers there and back: time and memory beside `cp`.

    .venv/bin/python benchmarks/conversion.py                                  # 3 GB, 3 times
    .venv/bin/python benchmarks/conversion.py --gb 10 --repeats 1 --skip-transformers
    .venv/bin/python benchmarks/conversion.py --gb 0.05                        # a toy, a minute

The checkpoint is Qwen2.5's in shape, bfloat16, with as many layers as --gb asks for; its widths are
those of the model of about that size (a toy's below 0.4 GB). The operations take turns, each
conversion in a process of its own. Right before each, output and older ones are removed, what is
dirty is written to disk, the source is read once (so that it is in the page cache, as far as memory
goes) or, with --cold, dropped from the cache, and free memory is written to once: a virtual
machine's host takes back what has been free for seconds, and whoever came next would pay for that.
Nothing waits for the disk at the end, neither cp nor the conversions.

s            median of the turns, least and most of them; a conversion's is without imports
× cp         cp's median over this median: more is faster
CPU s        median of user and system time, of all threads: sees less of who else is there
process s    median of the whole Python process, from its start to its end
peak GB      largest resident memory of the whole process in any turn, imports included

`transformers` loads the model and saves it, dtype="auto": the least that a conversion through a
model in memory does. In the end source and round trip are compared bit by bit.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from checkpoints_conversion.convert import hf_to_megatron, megatron_to_hf
from checkpoints_conversion.hf_writer import HFWriter
from checkpoints_conversion.source import Info

# The goals: the speed in terms of cp, and the memory, the greater of the two.
MIN_SPEED, MAX_PEAK_BYTES, MAX_PEAK_TENSORS = 0.7, 2.5e9, 3
CP_HF, CP_MEGATRON = "cp of the HF directory", "cp of the Megatron checkpoint"
TO_MEGATRON, TO_HF, TRANSFORMERS = "HF to Megatron", "Megatron to HF", "transformers, HF to HF"
BASE = {TO_MEGATRON: CP_HF, TO_HF: CP_MEGATRON, TRANSFORMERS: CP_HF}  # what it is compared to
NUM_COPIES, SPARE_BYTES = 3, 500_000_000  # on the disk at the same time, and beside them
PIECE_BYTES = 32 << 20
FINITE = np.uint64(0xBFFF_BFFF_BFFF_BFFF)  # four bfloat16 without the exponent's highest bit

Widths = dict[str, Any]
NAMES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
NAMES += ("vocab_size", "tie_word_embeddings")
WIDTHS: dict[float, Widths] = {  # from so many GB on
    20.0: dict(zip(NAMES, (5120, 27648, 40, 8, 152064, False), strict=True)),  # 32B
    3.0: dict(zip(NAMES, (3584, 18944, 28, 4, 152064, False), strict=True)),  # 7B
    1.0: dict(zip(NAMES, (1536, 8960, 12, 2, 151936, True), strict=True)),  # 1.5B
    0.4: dict(zip(NAMES, (896, 4864, 14, 2, 151936, True), strict=True)),  # 0.5B
    0.0: dict(zip(NAMES, (512, 1408, 8, 2, 8192, False), strict=True)),
}


@dataclass(frozen=True)
class Turn:
    """What one run of an operation took."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int  # resident, of the process
    process_seconds: float


@dataclass(frozen=True)
class Operation:
    """Makes one directory from another; both are names in the work directory."""

    source: str
    out: str
    run: Callable[[Path, Path], Any]
    is_python: bool = True


# the checkpoint


def make_config(gb: float) -> Qwen2Config:
    """A Qwen2.5 whose weights take about so many GB in bfloat16; at least one layer."""
    widths = next(widths for least, widths in WIDTHS.items() if gb >= least)
    one, two = (_num_bytes(_config(widths, num_layers)) for num_layers in (1, 2))
    return _config(widths, 1 + max(0, round((gb * 1e9 - one) / (two - one))))


def _config(widths: Widths, num_layers: int) -> Qwen2Config:
    return Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        dtype=torch.bfloat16,
        num_hidden_layers=num_layers,
        max_window_layers=num_layers,
        use_sliding_window=False,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        **widths,
    )


def tensors_of(config: Qwen2Config) -> dict[str, Info]:
    """Names and shapes, from transformers' model, in its order."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {
        name: Info(tuple(tensor.shape), torch.bfloat16)
        for name, tensor in model.state_dict().items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }


def _num_bytes(config: Qwen2Config) -> int:
    return sum(info.num_bytes for info in tensors_of(config).values())


def write_checkpoint(path: Path, config: Qwen2Config) -> None:
    """Random finite bfloat16 numbers of all magnitudes below 2, a few rows at a time."""
    path.mkdir()
    config.save_pretrained(path)
    infos = tensors_of(config)
    writer, random = HFWriter(path, infos), np.random.default_rng(0)
    for name, info in infos.items():
        for start, stop in _row_ranges(info.shape[0], info.row_bytes):
            num_words = -(-(stop - start) * info.row_bytes // 8)
            words = random.integers(0, 1 << 64, num_words, np.uint64) & FINITE
            rows = torch.from_numpy(words.view(np.uint8))[: (stop - start) * info.row_bytes]
            writer.write(name, start, rows)
    writer.finish()


def _row_ranges(num_rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    height = max(1, PIECE_BYTES // row_bytes)
    for start in range(0, num_rows, height):
        yield start, min(start + height, num_rows)


def difference(ours: Path, theirs: Path) -> str | None:
    """The first tensor that is not the same bits in both directories, read by safetensors."""
    a, b = (
        {name: file for file in sorted(path.glob("*.safetensors")) for name in _names(file)}
        for path in (ours, theirs)
    )
    if names := sorted(a.keys() ^ b.keys()):
        return f"{names[0]} (in one of them alone)"
    return next((name for name in a if not _same(name, a[name], b[name])), None)


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def _same(name: str, ours: Path, theirs: Path) -> bool:
    with safe_open(ours, "pt") as a, safe_open(theirs, "pt") as b:
        x, y = a.get_slice(name), b.get_slice(name)
        if (x.get_shape(), x.get_dtype()) != (y.get_shape(), y.get_dtype()):
            return False
        num_rows, *rest = x.get_shape()
        ranges = _row_ranges(num_rows, 2 * int(np.prod(rest)))
        return all(torch.equal(_bits(x[i:j]), _bits(y[i:j])) for i, j in ranges)


def _bits(rows: Tensor) -> Tensor:
    return rows.view(torch.int16)


# the operations


def run_one(work: Path, operation: Operation, is_cold: bool) -> Turn:
    """Python in a process of its own, whose memory is then that of the conversion alone."""
    if not operation.is_python:
        return run_here(work, operation, is_cold)[0]
    start = time.perf_counter()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        turn, seconds_before = pool.submit(run_here, work, operation, is_cold).result()
    return replace(turn, process_seconds=time.perf_counter() - start - seconds_before)


def run_here(work: Path, operation: Operation, is_cold: bool) -> tuple[Turn, float]:
    """What it took, and how long the preparations."""
    start = time.perf_counter()
    prepare(work, operation, is_cold)
    # not ru_maxrss: that cannot be reset, and begins with the parent's
    Path("/proc/self/clear_refs").write_text("5")
    before, cpu_before = time.perf_counter(), sum(os.times()[:4])
    operation.run(work / operation.source, work / operation.out)
    seconds, cpu_seconds = time.perf_counter() - before, sum(os.times()[:4]) - cpu_before
    peak_bytes = 1024 * _number("/proc/self/status", "VmHWM")
    return Turn(seconds, cpu_seconds, peak_bytes, seconds), before - start


def _number(file: str, field: str) -> int:
    lines = Path(file).read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def copy_directory(source: Path, out: Path) -> None:
    subprocess.run(["cp", "--reflink=never", "-r", str(source), str(out)], check=True)


def load_and_save(source: Path, out: Path) -> None:
    AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(out)


def operations(args: argparse.Namespace, num_bytes: int) -> dict[str, Operation]:
    """In the order of a turn: the round trip is there when it ends."""
    to_megatron = partial(hf_to_megatron, workers=args.workers)
    to_hf = partial(megatron_to_hf, workers=args.workers)
    found = {
        CP_HF: Operation("hf", "hf.copy", copy_directory, is_python=False),
        TO_MEGATRON: Operation("hf", "megatron", to_megatron),
        CP_MEGATRON: Operation("megatron", "megatron.copy", copy_directory, is_python=False),
        TO_HF: Operation("megatron", "round-trip", to_hf),
    }
    if args.skip_transformers:
        return found
    if (available := available_bytes()) < (needed := int(1.5 * num_bytes + 2e9)):
        print(
            f"transformers is left out: {available / 1e9:.1f} GB of memory are available, and "
            f"the whole model needs about {needed / 1e9:.1f} GB"
        )
        return found
    return {
        TRANSFORMERS: Operation("hf", "hf.saved", load_and_save),
        **found,
    }


def available_bytes() -> int:
    """Memory that processes or the page cache can take."""
    return 1024 * _number("/proc/meminfo", "MemAvailable")


def prepare(work: Path, operation: Operation, is_cold: bool) -> None:
    """The same state of disk and memory before every operation."""
    kept = {"hf", "megatron"} - {operation.out}
    for directory in work.iterdir():
        if directory.name not in kept:
            shutil.rmtree(directory)
    os.sync()
    files = [path for path in (work / operation.source).rglob("*") if path.is_file()]
    for path in files:
        _drop_from_cache(path) if is_cold else _read(path)
    num_bytes = sum(path.stat().st_size for path in files)
    _write_to_free_memory(2 * num_bytes if is_cold else num_bytes)


def _drop_from_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(path: Path) -> None:
    memory = bytearray(PIECE_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(memory):
            pass


def _write_to_free_memory(num_bytes: int) -> None:
    """As output and new cache take, a byte a page; at most what is free: the cache stays."""
    free = 1024 * _number("/proc/meminfo", "MemFree")
    memory = np.empty(min(num_bytes, int(0.9 * free)), np.uint8)
    memory[:: os.sysconf("SC_PAGE_SIZE")] = 1


def measure(
    work: Path, todo: dict[str, Operation], repeats: int, is_cold: bool
) -> dict[str, list[Turn]]:
    """All operations in turns."""
    found: dict[str, list[Turn]] = {name: [] for name in todo}
    for turn in range(repeats):
        for name, operation in todo.items():
            found[name].append(run_one(work, operation, is_cold))
            print(f"turn {turn + 1}, {name}: {found[name][-1].seconds:.2f} s", file=sys.stderr)
    return found


# what is printed


def table(found: dict[str, list[Turn]], num_bytes: int) -> str:
    """The operations below each other, in Markdown."""
    columns = "s", "least–most", "GB/s", "× cp", "CPU s", "process s", "peak GB"
    lines = ["| | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for name, turns in found.items():
        spread = [turn.seconds for turn in turns]
        cells = [name, f"{median(turns):.2f}", f"{min(spread):.2f}–{max(spread):.2f}"]
        cells += [f"{num_bytes / median(turns) / 1e9:.2f}", f"{speed(found, name):.2f}"]
        cells += [f"{statistics.median(turn.cpu_seconds for turn in turns):.2f}"]
        if name in BASE:
            cells += [f"{statistics.median(turn.process_seconds for turn in turns):.2f}"]
            cells += [f"{peak_bytes(turns) / 1e9:.2f}"]
        else:
            cells += ["–", "–"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def median(turns: list[Turn]) -> float:
    return statistics.median(turn.seconds for turn in turns)


def speed(found: dict[str, list[Turn]], name: str) -> float:
    """In terms of cp's."""
    return median(found[BASE.get(name, name)]) / median(found[name])


def peak_bytes(turns: list[Turn]) -> int:
    return max(turn.peak_bytes for turn in turns)


def goals(found: dict[str, list[Turn]], largest: int) -> str:
    """What is aimed at, and whether it is met."""
    most = max(MAX_PEAK_BYTES, MAX_PEAK_TENSORS * largest)
    lines = []
    for name in (TO_MEGATRON, TO_HF):
        is_fast, is_small = speed(found, name) >= MIN_SPEED, peak_bytes(found[name]) <= most
        lines += [f"- {name}: at least {MIN_SPEED} × cp: {'met' if is_fast else 'NOT met'}"]
        lines += [f"- {name}: at most {most / 1e9:.1f} GB: {'met' if is_small else 'NOT met'}"]
    return "\n".join(lines)


def check_disk(parent: Path, num_bytes: float) -> None:
    """End the program where there is no room."""
    if not parent.is_dir():
        sys.exit(f"--dir: {parent} is no directory")
    needed, free = NUM_COPIES * num_bytes + SPARE_BYTES, shutil.disk_usage(parent).free
    if free < needed:
        sys.exit(
            f"{parent} has {free / 1e9:.1f} GB free, and {NUM_COPIES} copies of "
            f"{num_bytes / 1e9:.1f} GB need {needed / 1e9:.1f} GB; "
            "give less with --gb, or another disk's directory with --dir"
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=3, help="of the checkpoint; 3 × that on disk")
    parser.add_argument("--dir", type=Path, help="where to work; by default for temporary files")
    parser.add_argument("--workers", type=int, default=2, help="threads of a conversion")
    parser.add_argument("--repeats", type=int, default=3, help="turns of every operation")
    parser.add_argument("--cold", action="store_true", help="sources are not in the page cache")
    parser.add_argument("--skip-transformers", action="store_true")
    parser.add_argument("--keep", action="store_true", help="leave all directories, and say where")
    args = parser.parse_args()
    if min(args.gb, args.workers, args.repeats) <= 0:
        parser.error("--gb, --workers and --repeats must be positive")
    return args


def main() -> None:
    args = parse_args()
    check_disk(args.dir or Path(tempfile.gettempdir()), args.gb * 1e9)
    config = make_config(args.gb)
    infos = tensors_of(config)
    num_bytes = sum(info.num_bytes for info in infos.values())
    print(
        f"{num_bytes / 1e9:.2f} GB in {len(infos)} tensors ({config.num_hidden_layers} layers of "
        f"width {config.hidden_size}), {args.repeats} turns, {args.workers} workers, "
        f"{os.cpu_count()} cores, the source {'not ' if args.cold else ''}in the page cache"
    )
    if 2 * num_bytes > available_bytes():
        print("Memory cannot hold source and output at once: the disk bounds cp and conversions")
    with tempfile.TemporaryDirectory(dir=args.dir, delete=not args.keep) as name:
        work = Path(name)
        write_checkpoint(work / "hf", config)
        found = measure(work, operations(args, num_bytes), args.repeats, args.cold)
        different = difference(work / "hf", work / "round-trip")
    print("\n" + table(found, num_bytes) + "\n\nGoals:\n")
    print(goals(found, max(info.num_bytes for info in infos.values())))
    print(f"\nRound trip: {f'{different} is different' if different else 'the same, bit by bit'}")
    if args.keep:
        print(f"Left: {work}")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
