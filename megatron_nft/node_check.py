"""Whether a node is fit for a run: its GPUs, what they exchange, and the shared file system.

`megatron-nft node-check` leaves a file of the node's name where it is, so that whoever waits knows
who is not, or does not answer.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

GIB = 2**30
MEASURED_BYTES, NUM_MEASURED = 256 * 2**20, 5
TIMEOUT_S = 180.0
MARK = "bus bandwidth: "  # NCCL prints too


def check(folder: Path, num_gpus: int, min_free_gib: float, min_all_reduce: float) -> int:
    """Print what is wrong, or that nothing is; an exit code.

    Args:
        folder: on the shared file system.
        min_all_reduce: bus bandwidth among the node's GPUs, GiB/s; 0: it is not measured.
    """
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]
    troubles = [*_gpus(num_gpus, min_free_gib), *_file_system(folder, name)]
    if min_all_reduce and not troubles:
        troubles = _all_reduce(num_gpus, min_all_reduce)
    for trouble in troubles:
        print(f"{name}: {trouble}", flush=True)
    if troubles:
        return 1
    (folder / name).touch()
    print(f"{name}: well", flush=True)
    return 0


def _gpus(num_gpus: int, min_free_gib: float) -> list[str]:
    import torch

    found = torch.cuda.device_count()
    if found < num_gpus:
        return [f"{found} GPUs, and {num_gpus} are wanted"]
    free = [torch.cuda.mem_get_info(i)[0] / GIB for i in range(num_gpus)]
    return [
        f"GPU {i} has {gib:.1f} GiB free, and {min_free_gib:g} are wanted"
        for i, gib in enumerate(free)
        if gib < min_free_gib
    ]


def _file_system(folder: Path, name: str) -> list[str]:
    """It takes what is written and gives it back."""
    file, content = folder / f".{name}.trial", os.urandom(1 << 20)
    try:
        with file.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        same = file.read_bytes() == content
        file.unlink()
    except OSError as error:
        return [f"the shared file system: {error}"]
    return [] if same else [f"the shared file system gave back other bytes in {folder}"]


def _all_reduce(num_gpus: int, least: float) -> list[str]:
    """Among the node's GPUs, or two processes on a node without."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_gpus or 2), "-m", "megatron_nft.node_check"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return [f"an all-reduce among its GPUs did not end within {TIMEOUT_S:g} s"]
    if done.returncode:
        return [f"an all-reduce among its GPUs failed: {done.stderr.strip()[-2000:]}"]
    rate = next(float(x[len(MARK) :]) for x in done.stdout.split("\n") if x.startswith(MARK))
    if rate < least:
        return [f"an all-reduce among its GPUs moves {rate:.2f} GiB/s, and {least:g} are wanted"]
    return []


def measure() -> float:
    """Bus bandwidth of an all-reduce, GiB/s, the median of some; under torchrun."""
    import torch
    import torch.distributed as dist

    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpus else "gloo")
    device = torch.device("cuda" if on_gpus else "cpu")
    data = torch.ones(MEASURED_BYTES // 4, device=device)
    seconds = []
    for _ in range(NUM_MEASURED + 1):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(data)
        if on_gpus:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    num = dist.get_world_size()
    dist.destroy_process_group()
    # a ring sends 2 (n - 1) / n of the bytes through every link
    moved = MEASURED_BYTES * 2 * (num - 1) / num
    return moved / sorted(seconds[1:])[NUM_MEASURED // 2] / GIB


if __name__ == "__main__":
    rate = measure()
    if os.environ["RANK"] == "0":
        print(f"\n{MARK}{rate}")
