"""Submit a recipe to a SLURM cluster through nemo-run: train, queued again until done; evaluate.

A run converts nothing and exports by itself: it reads the Hugging Face model, and leaves one.
"""

import json
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from launch import cluster as clusters
from launch import remote, scripts
from launch.cluster import Cluster
from megatron_nft import recipe
from megatron_nft.config import Config

JOBS_FILE = "jobs.json"  # in run_dir/launch
OTHERS_END_AFTER_S = 180  # once a node's task has ended, however it did
NO_NEMO_RUN = (
    "launch needs nemo-run, which has an environment of its own: run launch/setup/bootstrap.sh "
    "launch, then .venv-launch/bin/megatron-nft launch …"
)


class Job(NamedTuple):
    """A job of one task a node."""

    name: str
    num_nodes: int
    task: str  # shell text, on every node
    set_up: str = ""  # shell text, before, on the first node


def launch(
    path: Path,
    cluster_path: Path,
    overrides: Sequence[str],
    *,
    num_nodes: int,
    num_servers: int = 0,
    is_dry: bool = False,
) -> int:
    """Submit a run's jobs, or print their batch scripts; an exit code.

    Args:
        num_nodes: that train.
        num_servers: further nodes of the same job, each a vLLM server.

    Raises:
        ValueError: a recipe or a cluster file that cannot be used, or nemo-run is not there.
    """
    cluster, config = clusters.load(cluster_path), recipe.load(path, overrides)
    _check(cluster, config, num_nodes, num_servers)
    jobs = jobs_of(cluster, config, num_nodes, num_servers)
    if is_dry:
        with tempfile.TemporaryDirectory() as temporary:
            texts, _ = _submit(cluster, jobs, _title(config), Path(temporary), is_dry=True)
        print("\n".join(f"# {name}\n{text}" for name, text in texts.items()))
        return 0
    folder, there = _folder(cluster, config), PurePosixPath(cluster.workdir) / config.run_dir
    if cluster.ssh.host:
        remote.check(cluster.ssh, there / "launch")
    elif not shutil.which("sbatch"):
        raise ValueError("there is no sbatch here; submit from a login node, or give ssh.host")
    _check_not_running(cluster, folder)
    _, handles = _submit(cluster, jobs, _title(config), folder, is_dry=False)
    for name, handle in handles.items():
        print(f"{name}: job {handle['id']}")
    if cluster.ssh.host:
        remote.copy(cluster.ssh, folder / JOBS_FILE, there / "launch" / JOBS_FILE)
        print(f"on {cluster.ssh.host}, in {cluster.workdir}:")
    print(f"megatron-nft status {there}\nmegatron-nft logs {there}")
    return 0


def jobs_of(cluster: Cluster, config: Config, num_nodes: int, num_servers: int) -> list[Job]:
    """Each after the one before has succeeded."""
    text = scripts.train(cluster, config, num_nodes, num_servers)
    jobs = [Job("train", num_nodes + num_servers, text, scripts.set_up(cluster, config))]
    if config.evaluate.sets:
        jobs.append(Job("evaluate", 1, scripts.evaluate(cluster, config)))
    return jobs


def _check(cluster: Cluster, config: Config, num_nodes: int, num_servers: int) -> None:
    if num_nodes < 1 or num_servers < 0:
        raise ValueError(f"--nodes was {num_nodes}, --servers {num_servers}; at least 1 and 0")
    if Path(config.run_dir).is_absolute():
        raise ValueError(
            f"run_dir was {config.run_dir}; it may be relative, to the cluster's workdir "
            f"({cluster.workdir})"
        )
    if num_servers and config.rollout.engine != "remote":
        raise ValueError("--servers needs rollout.engine=remote")
    if config.rollout.engine == "remote" and not (num_servers or config.rollout.servers):
        raise ValueError("rollout.engine=remote needs --servers N: nodes with a vLLM server each")
    if re.search(r"\s|/nemo_run", f"{cluster.workdir}{config.run_dir}"):
        raise ValueError(
            f"workdir {cluster.workdir} and run_dir {config.run_dir} may hold no spaces, and no "
            "/nemo_run: nemo-run's scripts do not stand it"
        )
    total = num_nodes * cluster.gpus_per_node
    least = config.parallel.least_processes
    if total % least:
        raise ValueError(
            f"{num_nodes} nodes of {cluster.gpus_per_node} GPUs are not divided by the layout's "
            f"{least} processes (tensor · pipeline · context · expert); change --nodes"
        )
    if config.evaluate.sets and cluster.gpus_per_node % least:
        raise ValueError(
            f"the evaluation has one node of {cluster.gpus_per_node} GPUs, which the layout's "
            f"{least} processes do not divide; set evaluate.sets=[] and evaluate by another recipe"
        )


def _check_not_running(cluster: Cluster, folder: Path) -> None:
    """Raise ValueError where an earlier launch's jobs wait or run."""
    file = folder / JOBS_FILE
    jobs = json.loads(file.read_text()).values() if file.exists() else []
    numbers = [job["id"] for job in jobs if job["id"]]
    for number in numbers:
        words = ["squeue", "-h", "-j", number]
        if cluster.ssh.host:
            queued = remote.run(cluster.ssh, f"{shlex.join(words)} 2>/dev/null || true")
        else:
            queued = subprocess.run(words, capture_output=True, text=True).stdout
        if queued.strip():
            raise ValueError(
                f"{folder.parent} has been launched: job {number} waits or runs; scancel it first, "
                "or give another run_dir"
            )


def _folder(cluster: Cluster, config: Config) -> Path:
    """For what is written when jobs are submitted: in the run's directory, or a mirror of it."""
    home = Path("runs", "launched") if cluster.ssh.host else Path(cluster.workdir)
    return home / config.run_dir / "launch"


def _title(config: Config) -> str:
    return config.run_dir.strip("/").replace("/", "-")


def _submit(
    cluster: Cluster, jobs: Sequence[Job], title: str, folder: Path, *, is_dry: bool
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """The jobs' batch scripts by name, and where they are, unless `is_dry`."""
    try:
        import nemo_run as run
    except ModuleNotFoundError:
        raise ValueError(NO_NEMO_RUN) from None
    run.config.set_nemorun_home(str(folder / "nemo-run"))
    options = {"enable_goodbye_message": False, "skip_status_at_exit": True}
    with run.Experiment(title, **options) as experiment:
        before: list[str] = []
        for job in jobs:
            executor = _executor(run, cluster, job, title)
            script = run.Script(inline=job.task)
            before = [experiment.add(script, executor, job.name, dependencies=before)]
        if is_dry:
            experiment.dryrun(log=False, delete_exp_dir=False)
        else:
            _run(experiment, cluster, folder)
        texts = {job.id: _script_of(Path(job.executor.job_dir)) for job in experiment.jobs}
        return texts, _handles(experiment, cluster)


def _run(experiment: Any, cluster: Cluster, folder: Path) -> None:
    """Submit, and leave in a file what was, also where not all of it could be.

    Raises:
        ValueError: the login node did not do it; what is queued already is in the message.
    """
    try:
        with remote.told(cluster.ssh):
            experiment.run(detach=True)
    except ValueError as error:
        found = _handles(experiment, cluster).items()
        queued = [f"{name} {handle['id']}" for name, handle in found if handle["id"]]
        said = f"\nqueued already: job {', '.join(queued)}; scancel it" if queued else ""
        raise ValueError(f"{error}{said}") from error
    finally:
        text = json.dumps(_handles(experiment, cluster), indent=1)
        (folder / JOBS_FILE).write_text(text + "\n")


def _handles(experiment: Any, cluster: Cluster) -> dict[str, dict[str, str]]:
    """Each job's number, where it has one, and the folder of its logs."""
    found = {}
    for job in experiment.jobs:
        where = job.executor.job_dir
        if cluster.ssh.host:
            where = f"{job.executor.tunnel.job_dir}/{Path(where).name}"
        found[job.id] = {"id": (job.handle or "").rpartition("/")[2], "folder": where}
    return found


def _executor(run: Any, cluster: Cluster, job: Job, title: str) -> Any:
    """nemo-run's SlurmExecutor for a job."""
    interface, environment = cluster.network_interface, dict(cluster.environment)
    if interface:
        environment |= {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    container = cluster.container
    # nemo-run writes True as a flag without a value
    further = {name.replace("-", "_"): value or True for name, value in cluster.sbatch.items()}
    if job.set_up:
        further |= {"requeue": True, "signal": f"USR1@{cluster.notice_s}"}
    else:
        further |= {"kill_on_invalid_dep": "yes"}  # else it waits for ever where training failed
    return run.SlurmExecutor(
        account=cluster.account or None,
        partition=cluster.partition or None,
        qos=cluster.qos or None,
        time=cluster.time,
        nodes=job.num_nodes,
        ntasks_per_node=1,
        gpus_per_node=cluster.gpus_per_node or None,
        job_name_prefix=f"{title}-",
        tunnel=_tunnel(run, cluster),
        container_image=container.image or None,
        container_mounts=list(container.mounts),
        container_env=list(cluster.secrets) or None,
        packager=run.Packager(),
        env_vars={name: shlex.quote(value) for name, value in environment.items()},
        setup_lines=job.set_up or None,
        # nemo-run's 1 would end the others the moment that one node leaves with notice.REQUEUE; a
        # node that fails ends them a little later
        srun_args=["--kill-on-bad-exit=0", f"--wait={OTHERS_END_AFTER_S}"],
        additional_parameters=further or None,
        poll_estimated_start_time=False,
    )


def _tunnel(run: Any, cluster: Cluster) -> Any:
    ssh = cluster.ssh
    if not ssh.host:
        return run.LocalTunnel(job_dir="")
    return run.SSHTunnel(
        host=ssh.host,
        port=ssh.port or None,
        user=ssh.user,
        job_dir=ssh.job_dir,
        identity=remote.key_of(ssh) or None,
    )


def _script_of(folder: Path) -> str:
    """What Slurm gets, and what it runs on each node, as nemo-run wrote them."""
    batch = folder.with_name(f"{folder.name}_sbatch.sh").read_text()
    task = (folder / "scripts" / f"{folder.name}.sh").read_text()
    return f"{batch.rstrip()}\n\n# on each node:\n{task}"
