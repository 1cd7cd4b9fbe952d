"""What is sent to a cluster: cluster files, and the shell text of jobs."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import cluster as clusters
from launch import scripts, submit
from megatron_nft import recipe

ROOT = Path(__file__).parents[1] / "launch"
EXAMPLE = ROOT / "clusters" / "example.yaml"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
GOOD = {"workdir": "/shared/nft", "program": ".venv/bin/megatron-nft"}


def write(folder: Path, **values: Any) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(GOOD | values))
    return path


def run_of(path: Path, *words: str, **changes: Any) -> tuple[clusters.Cluster, Any]:
    return clusters.load(path), recipe.load(ROOT / "recipes" / "qwen2.5-32b.yaml", words)


def test_the_example_loads() -> None:
    cluster = clusters.load(EXAMPLE)
    assert cluster.gpus_per_node == 8
    assert cluster.sbatch == {"exclusive": "", "mem": "0"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"partitoin": "a"}, "there is no key partitoin; the nearest is partition"),
        ({"workdir": "nft"}, "workdir was 'nft'; it may be an absolute path"),
        ({"program": ""}, "program is empty"),
        ({"time": "4h"}, "time was '4h'; it may be like 04:00:00"),
        ({"notice_s": -1}, "notice_s was -1"),
        ({"time": "5", "notice_s": 300}, "notice_s was 300; it may be less than time"),
        ({"time": "04:00", "notice_s": 240}, "notice_s was 240"),
        ({"environment": {"http_proxy": "a"}}, "nemo-run would make it HTTP_PROXY"),
        ({"environment": {"WANDB_KEY": "a"}}, "environment.WANDB_KEY: a secret's value"),
        ({"environment": {"HF_TOKEN": "hf_abc"}}, "environment.HF_TOKEN: a secret's value"),
        ({"secrets": ["HF_TOKEN=hf_abc"]}, "secrets has 'HF_TOKEN=hf_abc'; it may have names"),
        ({"environment": {"A": 1}}, "environment.A was 1"),
        ({"ssh": {"host": "login"}}, "ssh.host needs ssh.user and ssh.job_dir"),
    ],
)
def test_a_cluster_file_that_cannot_be_used(
    tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=r"cluster\.yaml: ") as raised:
        clusters.load(write(tmp_path, **values))
    assert words in str(raised.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("num_servers", [0, 2])
def test_a_task_is_sound_shell_and_holds_the_recipe(
    tmp_path: Path, path: Path, num_servers: int
) -> None:
    cluster, config = clusters.load(write(tmp_path, secrets=["HF_TOKEN"])), recipe.load(path)
    text = scripts.train(cluster, config, num_nodes=4, num_servers=num_servers)
    for shell in (text, scripts.evaluate(cluster, config), scripts.set_up(cluster, config)):
        assert subprocess.run(["bash", "-n"], input=shell, text=True).returncode == 0
    held = text.split(f"<<'{scripts.END}'\n")[1].split(scripts.END)[0]
    (tmp_path / "held.yaml").write_text(held)
    assert recipe.load(tmp_path / "held.yaml") == config
    assert "${HF_TOKEN:?is not set}" in text
    assert "/shared/nft/.venv/bin/megatron-nft train" in text


def test_servers_have_the_last_nodes_and_trainers_know_them(tmp_path: Path) -> None:
    """The text itself is run, by a program that writes down how it is called."""
    told = tmp_path / "told"
    program = tmp_path / "program"
    program.write_text(
        f'#!/bin/bash\necho "$SLURM_NODEID $*" >>{told}\n[ "$1" != serve ] || exec sleep 60\n'
        # a training ends after its servers have begun
        f"for _ in $(seq 200); do [ $(grep -c ' serve ' {told}) = 2 ] && exit; sleep 0.1; done\n"
    )
    program.chmod(0o755)
    (tmp_path / "run" / "launch").mkdir(parents=True)
    path = write(tmp_path, workdir=str(tmp_path), program="program")
    cluster, config = run_of(path, "run_dir=run", "rollout.engine=remote")
    text = scripts.train(cluster, config, num_nodes=2, num_servers=2)
    names = {
        "NODE_NAMES": "a1,a2,a3,a4",
        "NODE_0": "a1",
        "SLURM_JOB_ID": "7",
        "PATH": "/usr/bin:/bin",
    }
    tasks = [
        subprocess.Popen(["bash", "-c", text], env=names | {"SLURM_NODEID": str(i)})
        for i in (3, 2, 1, 0)
    ]
    assert [task.wait(30) for task in tasks] == [0, 0, 0, 0]  # servers end with the training
    lines = sorted(told.read_text().splitlines())
    where = [line.split(" /tmp")[0] for line in lines]
    assert where == ["0 train", "1 train", "2 serve", "3 serve"]
    for line in lines[:2]:
        assert "--nodes 2" in line
        assert "--node-names a1,a2" in line
        assert "rollout.servers=[http://a3:8000,http://a4:8000]" in line


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ((), {"num_nodes": 0}, "--nodes was 0"),
        (("run_dir=/runs/a",), {}, "run_dir was /runs/a; it may be relative"),
        ((), {"num_servers": 2}, "--servers needs rollout.engine=remote"),
        (("rollout.engine=remote",), {}, "needs --servers N"),
        (("parallel.tensor=4", "parallel.pipeline=8"), {}, "8 GPUs are not divided by"),
    ],
)
def test_what_cannot_be_launched(
    tmp_path: Path, words: tuple[str, ...], options: dict[str, int], message: str
) -> None:
    numbers = {"num_nodes": 2 if "pipeline" not in str(words) else 3, "num_servers": 0} | options
    cluster, config = run_of(write(tmp_path), *words)
    with pytest.raises(ValueError, match=message):
        submit._check(cluster, config, **numbers)


def batch(
    tmp_path: Path, code: int, hosts: str = "node1", known: str = "", refuses: bool = False
) -> tuple[int, list[str]]:
    """Exit code and calls of a batch script whose task ends with a code; node1 alone is well.

    `scontrol` and `scancel` write their calls down; the first shows `hosts` and the job's excluded
    nodes, and may refuse to change anything.
    """
    told, bin_ = tmp_path / "told", tmp_path / "bin"
    bin_.mkdir(exist_ok=True)
    job = f"a=b ExcNodeList={known} c=d"
    show = f'case "$*" in *hostnames*) printf "{hosts}";; *) echo "{job}";; esac'
    for name, text in (
        (
            "scontrol",
            f'case "$*" in *show*) {show};; *) echo "$*" >>{told};; esac\n'
            f'[ "$1" != update ] || exit {int(refuses)}',
        ),
        ("scancel", f'echo "scancel $*" >>{told}'),
        ("srun", f"touch {tmp_path}/run/launch/well_7_0/node1"),
        ("sleep", "true"),
    ):
        (bin_ / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin_ / name).chmod(0o755)
    cluster, config = run_of(write(tmp_path, workdir=str(tmp_path)), "run_dir=run")
    text = scripts.set_up(cluster, config) + f"\nset -e\nexit {code}\n"  # as nemo-run's
    environment = {"PATH": f"{bin_}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n"}
    told.write_text("")
    done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True)
    return done.returncode, told.read_text().splitlines()


def queue_again(tmp_path: Path, code: int) -> str:
    found, calls = batch(tmp_path, code)
    assert found == code
    return " ".join(calls)


@pytest.mark.parametrize(
    ("known", "excluded"),
    [("", "node2"), ("(null)", "node2"), ("node7,node[8-9]", "node2,node7,node[8-9]")],
)
def test_nodes_that_are_not_well_are_excluded_with_those_before(
    tmp_path: Path, known: str, excluded: str
) -> None:
    code, calls = batch(tmp_path, 0, "node1\\nnode2\\n", known)
    assert code == 1
    assert calls == ["requeue 7", f"update JobId=7 ExcNodeList={excluded}"]


def test_a_job_that_would_come_back_to_the_same_nodes_is_cancelled(tmp_path: Path) -> None:
    code, calls = batch(tmp_path, 0, "node1\\nnode2\\n", refuses=True)
    update = "update JobId=7 ExcNodeList=node2"
    assert (code, calls) == (1, ["requeue 7", update, update, update, "scancel 7"])


def test_where_no_node_is_well_the_job_is_not_queued_again(tmp_path: Path) -> None:
    assert batch(tmp_path, 0, "node2\\n") == (1, [])


def test_a_job_is_queued_again_while_that_is_of_use(tmp_path: Path) -> None:
    again = "requeue 7"
    assert queue_again(tmp_path, 0) == ""
    assert queue_again(tmp_path, 85) == again  # told to stop
    assert queue_again(tmp_path, 138) == again  # before it listened
    assert queue_again(tmp_path, 143) == again  # one node failed, and Slurm ended this one
    assert queue_again(tmp_path, 143) == ""
    (tmp_path / "run" / "launch" / "failed_at").unlink()
    assert queue_again(tmp_path, 1) == again  # the first failure may be a node's
    assert queue_again(tmp_path, 1) == ""  # no further than before
    (tmp_path / "run" / "checkpoints" / "rollout_2").mkdir(parents=True)
    assert queue_again(tmp_path, 86) == again  # it stalled, and had come further
    assert queue_again(tmp_path, 86) == ""
    (tmp_path / "run" / "checkpoints" / "rollout_10").mkdir()
    (tmp_path / "run" / "checkpoints" / "rollout_9").mkdir()
    assert queue_again(tmp_path, 1) == again
    assert (tmp_path / "run" / "launch" / "failed_at").read_text() == "rollout_10\n"
    assert [queue_again(tmp_path, 85) for _ in range(4)] == [again, again, "", ""]  # no further
    (tmp_path / "run" / "checkpoints" / "rollout_12").mkdir()
    assert queue_again(tmp_path, 85) == again
