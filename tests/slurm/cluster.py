"""A real Slurm of a few "nodes" on this machine, for as long as a `with` lasts.

slurmctld, slurmd and munged are started by hand in a scratch folder; nothing of the machine's own
configuration is read or changed, but names of the nodes are added to the hosts file.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import psutil

from megatron_nft.processes import end_with_parent

CTLD_PORT, FIRST_PORT = 16817, 17001
CPUS, MEMORY_MB = 4, 8000  # that a node claims to have
PROGRAMS = ("slurmctld", "slurmd", "munged", "unshare", "scontrol", "sbatch")

CONF = """
ClusterName=nft
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=3
MinJobAge=300
JobRequeue=1
"""
# Without an accounting database there is no `sacct`, which nemo-run asks how a job ended. This
# prints the same columns from the controller's memory.
SACCT = """#!/bin/sh
while [ $# -gt 0 ] && [ "$1" != -j ] && [ "$1" != --jobs ]; do shift; done
exec scontrol -o show job "$2" | awk '
{ for (i = 1; i <= NF; i++) { split($i, kv, "="); v[kv[1]] = kv[2] }
  s = v["JobState"]; if (s == "COMPLETING") s = "RUNNING"
  print v["JobId"] "|" v["JobName"] "|" v["Partition"] "||1|" s "|" v["ExitCode"] }'
"""


def trouble() -> str | None:
    """Why there can be no Slurm here."""
    missing = [name for name in PROGRAMS if not _which(name)]
    if missing:
        return f"Slurm is not installed: no {', '.join(missing)} (make test-slurm installs it)"
    return None if os.geteuid() == 0 else "slurmd needs root"


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Slurm:
    """A controller and nodes node1, node2, …; a context manager. `environment` is for clients."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder, self.nodes = folder, [f"node{i + 1}" for i in range(num_nodes)]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        tools = folder / "bin"
        path = f"{tools}:{os.environ['PATH']}:/usr/sbin:/sbin"
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        self._write()
        self._name_nodes()
        munge = ["munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key"]
        munge += [f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munge.pid"]
        munge += [f"--log-file={self.folder}/munge.log", f"--seed-file={self.folder}/munge.seed"]
        self._start("munged", *munge)
        self._until(lambda: (self.folder / "munge.socket").exists())
        self._start("slurmctld", "slurmctld", "-D", "-c")
        for node in self.nodes:
            self.start_node(node)
        self._until(lambda: self.states() == dict.fromkeys(self.nodes, "idle"))
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["scancel", "--user=root"], env=self.environment, check=False)
        deadline = time.monotonic() + 15
        while self.jobs() and time.monotonic() < deadline:
            time.sleep(0.5)
        for node in self.nodes:
            if node in self._daemons:
                self.kill_node(node)  # with whatever of a job is left
        for name in list(self._daemons):
            self._end(name)

    def start_node(self, node: str) -> None:
        inside = f"hostname {node} && exec slurmd -D -N {node}"
        self._start(node, "unshare", "--uts", "sh", "-c", inside)

    def kill_node(self, node: str) -> None:
        """As when its power fails: the daemon, and all that it ran."""
        daemon = psutil.Process(self._daemons.pop(node).pid)
        steps = [p for p in psutil.process_iter(["cmdline"]) if _is_step_of(p, daemon)]
        victims = [q for p in [daemon, *steps] for q in [p, *p.children(recursive=True)]]
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()

    def states(self) -> dict[str, str]:
        """Of the nodes, in sinfo's words."""
        lines = self.run("sinfo", "--noheader", "-N", "-o", "%N %T").split("\n")
        return dict(line.split() for line in lines if line)

    def jobs(self) -> list[str]:
        """Jobs that wait or run: `id name state`."""
        return [x for x in self.run("squeue", "--noheader", "-o", "%i %j %T").split("\n") if x]

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job."""
        words = self.run("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return done.stdout.strip()

    def wait_for(self, number: str, states: tuple[str, ...], within_s: float) -> dict[str, str]:
        self._until(lambda: self.job(number).get("JobState") in states, within_s)
        return self.job(number)

    def _write(self) -> None:
        for name in ("state", "bin"):
            (self.folder / name).mkdir(exist_ok=True)
        for node in self.nodes:
            (self.folder / f"spool.{node}").mkdir(exist_ok=True)
        conf = CONF.format(host=socket.gethostname(), port=CTLD_PORT, folder=self.folder)
        for i, node in enumerate(self.nodes):
            conf += f"NodeName={node} NodeAddr=127.0.0.1 Port={FIRST_PORT + i} CPUs={CPUS} "
            conf += f"RealMemory={MEMORY_MB} State=UNKNOWN\n"
        conf += f"PartitionName=batch Nodes={','.join(self.nodes)} Default=YES State=UP\n"
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "cgroups").mkdir(exist_ok=True)
        mount = f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={self.folder}/cgroups\n"
        (self.folder / "cgroup.conf").write_text(mount)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        (self.folder / "bin" / "sacct").write_text(SACCT)
        (self.folder / "bin" / "sacct").chmod(0o755)

    def _name_nodes(self) -> None:
        hosts = Path("/etc/hosts")
        known = hosts.read_text().split()
        missing = [node for node in self.nodes if node not in known]
        if missing:
            with hosts.open("a") as file:
                file.write(f"\n127.0.0.1 {' '.join(missing)}\n")

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=end_with_parent,  # also where the tests are killed
            )

    def _end(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _until(self, is_so: Callable[[], bool], within_s: float = 30.0) -> None:
        deadline = time.monotonic() + within_s
        while not is_so():
            assert time.monotonic() < deadline, f"{self.states()} {self.jobs()}"
            time.sleep(0.25)


def _is_step_of(process: psutil.Process, daemon: psutil.Process) -> bool:
    """slurmstepd is in its node's UTS namespace, and outlives slurmd."""
    if "slurmstepd" not in " ".join(process.info["cmdline"] or []):
        return False
    with contextlib.suppress(FileNotFoundError):
        return _uts(process.pid) == _uts(daemon.pid)
    return False


def _uts(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/uts")
