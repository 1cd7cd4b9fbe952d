"""Start a run's processes on this machine, once everything that can be checked is right."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import psutil

from megatron_nft import recipe
from megatron_nft.config import Config
from megatron_nft.nodes import ALONE, Nodes, roll_call
from megatron_nft.nodes import check as check_nodes
from megatron_nft.notice import SIGNALS, Notice
from megatron_nft.policy import fp8

PR_SET_PDEATHSIG = 1  # linux/prctl.h
FORWARD_EVERY_S = 0.5
_libc = ctypes.CDLL(None)  # before any fork

# what Megatron-Core and vLLM say at every import, on hosts that lack optional parts
QUIET = {"PYTHONWARNINGS": "ignore", "VLLM_LOGGING_LEVEL": "ERROR"}


def run(path: Path, overrides: Sequence[str], nodes: Nodes = ALONE, *, verb: str = "train") -> int:
    """Check the recipe and what it names, then run it under torchrun; its exit code.

    With several nodes every one of them does this; training begins once all have come.

    Args:
        verb: the command that each process is to carry out: train, or evaluate.

    Raises:
        ValueError: see recipe.load, preflight.check and nodes.roll_call.
    """
    check_nodes(nodes)
    config = recipe.load(path, overrides)
    if nodes.num == 1:
        num_here = _check(config, nodes)
    else:
        num_here, trouble = 0, ""
        try:
            num_here = _check(config, nodes)
        except (ValueError, OSError, RuntimeError) as error:
            trouble = str(error)
        roll_call(nodes, trouble)
    logs = Path(config.run_dir) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "megatron_nft.agent", *_rendezvous(nodes)]
    command += ["--nproc-per-node", str(num_here), "--log-dir", str(logs)]
    command += ["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT"]  # the others: see _run_agent
    if num_here > 1:  # only one process speaks on the terminal; the others into files
        others = ",".join(f"{rank}:3" for rank in range(1, num_here))
        command += ["--redirects", others]
    command += ["-m", "megatron_nft", verb, str(path), *overrides]
    print(f"starting {num_here} processes; imports and the engine take a while", flush=True)
    # one thread each, unless the user says otherwise: what torchrun would do, without its notice
    environment = QUIET | {"OMP_NUM_THREADS": "1"} | fp8.environment(config.fp8) | os.environ
    return _run_agent(command, environment)


def _check(config: Config, nodes: Nodes) -> int:
    """What can be known to be wrong on this node; the number of its training processes."""
    from megatron_nft.preflight import check  # seconds of imports, for a recipe that is right

    num_processes = num_processes_of(config, nodes.num)
    num_served = num_server_gpus(config)
    if nodes.num > 1 and config.rollout.engine == "remote" and not config.rollout.servers:
        raise ValueError(
            "rollout.engine=remote on several nodes needs rollout.servers: start each by "
            "`megatron-nft serve` on a node of its own"
        )
    if num_processes % nodes.num:
        raise ValueError(
            f"{num_processes} processes are not divided by {nodes.num} nodes; change "
            "parallel.num_processes, or the number of nodes"
        )
    num_here = num_processes // nodes.num
    if 0 < num_gpus() < num_here + num_served:
        servers = f" and {num_served} GPUs for servers" if num_served else ""
        raise ValueError(
            f"the recipe's layout needs {num_here} processes{servers}, but this host has "
            f"{num_gpus()} GPUs; lower parallel.tensor, parallel.pipeline, parallel.context, "
            "parallel.expert, parallel.num_processes or rollout.num_servers"
        )
    check(config, num_processes)
    return num_here


def _rendezvous(nodes: Nodes) -> list[str]:
    """torchrun's words for where the processes meet."""
    if nodes.num == 1:
        return ["--standalone"]
    where = ["--master-addr", nodes.host, "--master-port", str(nodes.port + 1)]
    return ["--nnodes", str(nodes.num), "--node-rank", str(nodes.rank), *where]


def _run_agent(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """The agent's exit code, notice.REQUEUE where the training processes have saved and left.

    The notice is for the training processes alone: torchrun would end them half a minute later,
    whatever they are doing. They are told again and again, as they may not listen yet.
    """
    agent = subprocess.Popen(command, env=environment, preexec_fn=_become_agent)
    with Notice() as notice:
        while agent.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                agent.wait(FORWARD_EVERY_S)
            if notice.has_come:
                _tell_children(agent.pid)
    return agent.returncode


def _become_agent() -> None:
    """torchrun ends with this process, and the training processes with it; no notice is for it."""
    end_with_parent()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _tell_children(pid: int) -> None:
    with contextlib.suppress(psutil.Error):  # who has ended needs no telling
        for process in psutil.Process(pid).children():
            if "megatron_nft" in process.cmdline():
                process.send_signal(signal.SIGUSR1)


def end_with_parent() -> None:
    """Have the kernel end this process when the thread that started it ends (Linux)."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def evaluate(path: Path, overrides: Sequence[str], model: Path | None) -> int:
    """Evaluate a model, that which the recipe's run exported unless one is given; an exit code.

    The numbers are left in the run's directory, in a folder of `evaluation/`.

    Raises:
        ValueError: see run; or the recipe has no evaluation sets.
    """
    config = recipe.load(path, overrides)
    if not config.evaluate.sets:
        raise ValueError("evaluate.sets is empty: there is nothing to evaluate")
    run_dir = Path(config.run_dir)
    where = run_dir / "evaluation" / time.strftime("%Y-%m-%d_%H-%M-%S")
    changed = [f"run_dir={where}", f"model.path={model or run_dir / 'hf'}"]
    changed += ["rollout.weight_transfer=files"]
    if config.model.dtype == "bfloat16":
        changed += ["memory.offload=true"]  # one node may have no room for an optimizer beside vLLM
    changed += ["rollout.engine=colocated", "rollout.servers=[]", "parallel.num_processes=0"]
    changed += ["rollout.max_steps_off_policy=0", "rollout.in_flight_updates=false"]
    return run(path, [*overrides, *changed], verb="evaluate")


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


def num_processes_of(config: Config, num_nodes: int = 1) -> int:
    """As many processes as the recipe says; else one a GPU that no server has, or the least that
    the layout needs. Of all nodes together, which have as many GPUs as this one.
    """
    parallel = config.parallel
    least = parallel.least_processes
    num_free = num_nodes * num_gpus() - num_server_gpus(config)
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
