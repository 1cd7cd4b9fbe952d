"""Start a run's processes on this machine, once everything that can be checked is right."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_nft import recipe
from megatron_nft.config import Config
from megatron_nft.policy import fp8

# what Megatron-Core and vLLM say at every import, on hosts that lack optional parts
QUIET = {"PYTHONWARNINGS": "ignore", "VLLM_LOGGING_LEVEL": "ERROR"}


def run(path: Path, overrides: Sequence[str]) -> int:
    """Check the recipe and what it names, then run it under torchrun; its exit code.

    Raises:
        ValueError: see recipe.load and preflight.check.
    """
    config = recipe.load(path, overrides)
    from megatron_nft.preflight import check  # seconds of imports, for a recipe that is right

    num_processes = num_processes_of(config)
    num_served = num_server_gpus(config)
    if 0 < num_gpus() < num_processes + num_served:
        servers = f" and {num_served} GPUs for servers" if num_served else ""
        raise ValueError(
            f"the recipe's layout needs {num_processes} processes{servers}, but this host has "
            f"{num_gpus()} GPUs; lower parallel.tensor, parallel.pipeline, parallel.context, "
            "parallel.expert, parallel.num_processes or rollout.num_servers"
        )
    check(config, num_processes)
    logs = Path(config.run_dir) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_processes), "--log-dir", str(logs)]
    if num_processes > 1:  # only one process speaks on the terminal; the others into files
        others = ",".join(f"{rank}:3" for rank in range(1, num_processes))
        command += ["--redirects", others]
    command += ["-m", "megatron_nft", "train", str(path), *overrides]
    print(f"starting {num_processes} processes; imports and the engine take a while", flush=True)
    # one thread each, unless the user says otherwise: what torchrun would do, without its notice
    environment = QUIET | {"OMP_NUM_THREADS": "1"} | fp8.environment(config.fp8) | os.environ
    return subprocess.run(command, env=environment).returncode


def serve(path: Path, overrides: Sequence[str], host: str, port: int) -> NoReturn:
    """Become a vLLM server of the recipe's model: what ends this process ends the server.

    Raises:
        ValueError: see recipe.load; or the model cannot be used.
    """
    config = recipe.load(path, overrides)
    from megatron_nft.preflight import check_engine
    from megatron_nft.rollout import servers

    check_engine(config, is_here=True)
    where = ("--host", host, "--port", port)
    command = servers.command(
        Path(config.model.path),
        config.rollout,
        config.model.dtype,
        config.longest,
        config.seed,
        *where,
    )
    os.execve(command[0], command, servers.environment(config.rollout))


def num_processes_of(config: Config) -> int:
    """As many processes as the recipe says; else one a GPU that no server has, or the least that
    the layout needs.
    """
    parallel = config.parallel
    least = parallel.least_processes
    num_free = num_gpus() - num_server_gpus(config)
    return parallel.num_processes or max(least, num_free // least * least)


def num_server_gpus(config: Config) -> int:
    """GPUs of this machine that the run's own vLLM servers take."""
    rollout = config.rollout
    starts_servers = rollout.engine == "remote" and not rollout.servers
    return rollout.num_servers * rollout.tensor if starts_servers else 0


def num_gpus() -> int:
    """GPUs of this machine that torch sees."""
    import torch

    return torch.cuda.device_count()
