"""What the jobs do, as the shell text that nemo-run's templates take in.

A batch script (on a job's first node) looks at the nodes, runs one task a node by srun, and has the
job queued again where that is of use. Everything is in the text: `--dry-run` shows all of it.
"""

import shlex
from dataclasses import asdict
from pathlib import PurePosixPath

from omegaconf import OmegaConf

from launch.cluster import Cluster
from megatron_nft.config import Config
from megatron_nft.notice import REQUEUE

UNHEARD = 128 + 10  # SIGUSR1 ended a launcher that did not listen yet
END = "END_OF_RECIPE"

# Queued again: who was told to stop, unless three times without a newer checkpoint; and who failed
# after coming further than at the last failure. Where one node fails Slurm ends the others with
# SIGTERM, which is no notice for that reason. Slurm ends this shell with it too, at the time limit.
AGAIN = """\
export NODE_NAMES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd ,)
export NODE_0=${{NODE_NAMES%%,*}}
state={state}
mkdir -p "$state"
newest() {{
    (cd {run_dir}/checkpoints 2>/dev/null && ls -d rollout_* | grep -v '[.]' | sort -V | tail -n 1)
}}
queue_again() {{
    local code=${{1:-$?}} newest last
    set +e
    trap '' TERM  # requeue ends this script
    [ "$code" = 0 ] && return
    newest=$(newest)
    case $code in
    {stopped})
        echo "$newest" >>"$state/stopped_at"
        if [ "$(tail -n 3 "$state/stopped_at" | grep -cx "$newest")" = 3 ]; then
            echo "megatron-nft: told to stop, 3 times at the same checkpoint; not queued again:" \
                "a job's time is too short for a rollout, or there is no room for checkpoints"
            return
        fi
        echo "megatron-nft: told to stop; queued again" ;;
    *)
        last=$(cat "$state/failed_at" 2>/dev/null || echo never)
        if [ "$newest" = "$last" ]; then
            echo "megatron-nft: failed (exit code $code), no further than before; not queued again"
            return
        fi
        echo "$newest" >"$state/failed_at"
        echo "megatron-nft: failed (exit code $code); queued again" ;;
    esac
    scontrol requeue "$SLURM_JOB_ID"
    sleep 30  # until Slurm ends this script
}}
trap queue_again EXIT
trap '[ "$(date +%s)" -lt "${{SLURM_JOB_END_TIME:-9999999999}}" ] || queue_again 143' TERM
"""

# Each node says that it is well in a file; the job is queued again without those that do not.
HEALTH = """\
well=$state/well_${{SLURM_JOB_ID}}_${{SLURM_RESTART_COUNT:-0}}
mkdir -p "$well"
timeout -k 30 {timeout_s} srun --overlap --kill-on-bad-exit=0 {container}{program} node-check \
{options} --folder "$well"
ill=
for name in ${{NODE_NAMES//,/ }}; do [ -e "$well/$name" ] || ill="$ill,$name"; done
if [ -n "$ill" ]; then
    trap '' TERM
    trap - EXIT
    echo "megatron-nft: not well, or silent for {timeout_s} s: ${{ill#,}}"
    if [ "${{ill#,}}" = "$NODE_NAMES" ]; then
        echo "megatron-nft: that is all of them; not queued again, look at what was asked of them"
        exit 1
    fi
    echo "megatron-nft: queued again without"
    known=$(scontrol -o show job "$SLURM_JOB_ID" |
        sed -n 's/.* ExcNodeList=\\([^ (][^ ]*\\).*/,\\1/p')
    scontrol requeue "$SLURM_JOB_ID"
    for try in 1 2 3; do  # pending as it is now, the job can be told where not to go
        scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${{ill#,}}$known" && exit 1
        sleep 2
    done
    echo "megatron-nft: Slurm does not leave them out; the job is cancelled"
    scancel "$SLURM_JOB_ID"
    exit 1
fi
"""

TASK = """\
set -eu
cd {workdir}
{secrets}recipe=$(mktemp --suffix=.yaml)
cat >"$recipe" <<'{end}'
{recipe}{end}
"""

TRAIN = """\
exec {program} train "$recipe" --nodes {nodes} --node-rank "$SLURM_NODEID" \
--meeting "$NODE_0:$((20000 + SLURM_JOB_ID % 20000))" --node-names "$NODE_NAMES" \
--start-timeout {start_timeout_s:g}
"""

# The last nodes serve; the first ones train, and end the servers by a file when they are done.
TRAIN_AND_SERVE = """\
trap '' USR1  # Slurm sends the notice to this shell too
names=(${{NODE_NAMES//,/ }})
done=$PWD/{state}/done_${{SLURM_JOB_ID}}_${{SLURM_RESTART_COUNT:-0}}
if [ "$SLURM_NODEID" -ge {nodes} ]; then
    {program} serve "$recipe" --host "$(hostname)" --port {port} &
    server=$!
    # looked for by a listing: network file systems remember what was not there
    until ls "$(dirname "$done")" | grep -qx "$(basename "$done")" || ! kill -0 $server; do
        sleep 2
    done
    if [ ! -e "$done" ]; then wait $server; exit 1; fi
    kill $server
    for _ in $(seq 30); do kill -0 $server 2>/dev/null || exit 0; sleep 1; done
    kill -9 $server
    exit 0
fi
servers=$(printf ',http://%s:{port}' "${{names[@]:{nodes}}}")
trained=$(IFS=,; echo "${{names[*]:0:{nodes}}}")
code=0
{program} train "$recipe" --nodes {nodes} --node-rank "$SLURM_NODEID" \
--meeting "$NODE_0:$((20000 + SLURM_JOB_ID % 20000))" --node-names "$trained" \
--start-timeout {start_timeout_s:g} "rollout.servers=[${{servers#,}}]" || code=$?
touch "$done"
exit $code
"""


def set_up(cluster: Cluster, config: Config) -> str:
    """Lines of the training job's batch script, before its tasks."""
    run_dir = PurePosixPath(cluster.workdir) / config.run_dir
    stopped = "|".join(map(str, (REQUEUE, UNHEARD)))
    text = AGAIN.format(
        state=shlex.quote(str(run_dir / "launch")),
        run_dir=shlex.quote(str(run_dir)),
        stopped=stopped,
    )
    health = cluster.health
    options = f"--gpus {cluster.gpus_per_node} --min-free-gib {health.min_free_gib:g} "
    options += f"--min-all-reduce {health.min_all_reduce_gib_s:g}"
    return text + HEALTH.format(
        timeout_s=f"{health.timeout_s:g}",
        container=_container(cluster),
        program=_program(cluster),
        options=options,
    )


def train(cluster: Cluster, config: Config, num_nodes: int, num_servers: int = 0) -> str:
    """One node's task: the launcher of its training processes, or a server."""
    values = {
        "program": _program(cluster),
        "nodes": num_nodes,
        "start_timeout_s": cluster.start_timeout_s,
    }
    if not num_servers:
        return _task(cluster, config) + TRAIN.format(**values)
    state = shlex.quote(str(PurePosixPath(config.run_dir) / "launch"))
    serving = TRAIN_AND_SERVE.format(**values, state=state, port=8000)
    return _task(cluster, config) + serving


def evaluate(cluster: Cluster, config: Config) -> str:
    """The task that evaluates what was exported, on one node."""
    return _task(cluster, config) + f'exec {_program(cluster)} evaluate "$recipe"\n'


def _task(cluster: Cluster, config: Config) -> str:
    secrets = "".join(f': "${{{name}:?is not set}}"\n' for name in cluster.secrets)
    return TASK.format(
        workdir=shlex.quote(cluster.workdir),
        secrets=secrets,
        recipe=OmegaConf.to_yaml(OmegaConf.create(asdict(config))),
        end=END,
    )


def _program(cluster: Cluster) -> str:
    """On the nodes, or in the container."""
    if cluster.container.image and not cluster.program:
        return "megatron-nft"
    return shlex.quote(str(PurePosixPath(cluster.workdir) / cluster.program))


def _container(cluster: Cluster) -> str:
    """srun's flags, for the step that nemo-run does not write."""
    container = cluster.container
    if not container.image:
        return ""
    mounts = f"--container-mounts {shlex.quote(','.join(container.mounts))} "
    return f"--container-image {shlex.quote(container.image)} {mounts}"
