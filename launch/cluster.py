"""A cluster file: what a SLURM site wants to be told, and where things lie there."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from megatron_nft import recipe

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")


@dataclass(frozen=True)
class Container:
    """For pyxis; without an image the virtual environment is used."""

    image: str = ""  # a registry's name, or a .sqsh file
    mounts: list[str] = field(default_factory=list)  # FROM:TO[:ro]; workdir must be among them


@dataclass(frozen=True)
class Ssh:
    """Where to submit from; empty: from here."""

    host: str = ""
    port: int = 0  # 0: as ssh's configuration says
    user: str = ""
    identity: str = ""  # a private key's file; empty: ssh finds one
    job_dir: str = ""  # for nemo-run's files, on the cluster's shared file system


@dataclass(frozen=True)
class Health:
    """What a node must show before the job begins; 0: not looked at."""

    min_free_gib: float = 0.0  # of every GPU's memory
    min_all_reduce_gib_s: float = 0.0  # bus bandwidth among the node's GPUs
    timeout_s: float = 300.0  # for all nodes together: who has not answered is left out


@dataclass(frozen=True)
class Cluster:
    """See launch/clusters/example.yaml."""

    workdir: str = ""  # on the shared file system; relative paths of recipes begin there
    program: str = ""  # the environment's `megatron-nft` there; relative to workdir
    account: str = ""
    partition: str = ""
    qos: str = ""
    time: str = "04:00:00"  # of one job; a run takes as many as it needs
    notice_s: int = 300  # before that time ends the run is told, saves and is queued again
    gpus_per_node: int = 8  # 0: a CPU cluster
    container: Container = field(default_factory=Container)
    network_interface: str = ""  # for NCCL's and gloo's sockets, such as ib0
    environment: dict[str, str] = field(default_factory=dict)
    secrets: list[str] = field(default_factory=list)  # names of variables that must be set there
    sbatch: dict[str, str] = field(default_factory=dict)  # further options, such as mem: "0"
    start_timeout_s: float = 600.0  # until a node that does not come ends the others
    health: Health = field(default_factory=Health)
    ssh: Ssh = field(default_factory=Ssh)


def load(path: Path) -> Cluster:
    """Read and check a cluster file.

    Raises:
        ValueError: a file that cannot be read, an unknown key, a value that cannot be used.
    """
    cluster = recipe.read(Cluster, path)
    try:
        _check(cluster)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return cluster


def _check(cluster: Cluster) -> None:
    if not Path(cluster.workdir).is_absolute():
        raise ValueError(f"workdir was {cluster.workdir!r}; it may be an absolute path there")
    if not cluster.program and not cluster.container.image:
        raise ValueError("program is empty; give the path of `megatron-nft`, or container.image")
    if not TIME.fullmatch(cluster.time):
        raise ValueError(f"time was {cluster.time!r}; it may be like 04:00:00 or 1-00:00:00")
    if cluster.notice_s >= _seconds(cluster.time):
        raise ValueError(f"notice_s was {cluster.notice_s}; it may be less than time")
    for key in ("notice_s", "gpus_per_node", "start_timeout_s"):
        if getattr(cluster, key) < 0:
            raise ValueError(f"{key} was {getattr(cluster, key)}; it may be 0 or more")
    for key, names in (("environment", cluster.environment), ("secrets", cluster.secrets)):
        for name in names:
            if not NAME.fullmatch(name):
                raise ValueError(f"{key} has {name!r}; it may have names of variables, no values")
    for name in cluster.environment:
        if name != name.upper():
            raise ValueError(f"environment.{name}: nemo-run would make it {name.upper()}")
        if name in cluster.secrets or re.search("TOKEN|SECRET|PASS|KEY$", name, re.IGNORECASE):
            raise ValueError(
                f"environment.{name}: a secret's value would stand in every job's script; list its "
                "name in `secrets` and set it in your shell there"
            )
    if cluster.ssh.host:
        _check_ssh(cluster.ssh)


def _check_ssh(ssh: Ssh) -> None:
    if not (ssh.user and ssh.job_dir):
        raise ValueError("ssh.host needs ssh.user and ssh.job_dir")
    if not 0 <= ssh.port < 2**16:
        raise ValueError(f"ssh.port was {ssh.port}; it may be 0 to 65535")
    if not Path(ssh.job_dir).is_absolute() or re.search(r"\s|/nemo_run", ssh.job_dir):
        raise ValueError(
            f"ssh.job_dir was {ssh.job_dir!r}; it may be an absolute path without spaces and "
            "without /nemo_run, which nemo-run's scripts do not stand"
        )
    if re.search(r"[\s'\"]", ssh.identity):
        raise ValueError(f"ssh.identity was {ssh.identity!r}; it may hold no spaces and quotes")


def _seconds(time: str) -> int:
    """Of Slurm's [days-]hours:minutes:seconds, where less is minutes[:seconds] or days-hours."""
    days, _, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        parts = parts + [0] * (3 - len(parts))
    elif len(parts) == 1:
        parts = [0, *parts, 0]
    elif len(parts) == 2:
        parts = [0, *parts]
    hours, minutes, seconds = parts
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
