"""The command line of clusters: `megatron-nft launch|status|logs|node-check`."""

import argparse
from pathlib import Path


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """What every command about a recipe begins with."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace recipe values")


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Add `launch`, `status`, `logs` and `node-check`."""
    _add_launch(commands)
    _add_looking(commands)
    _add_node_check(commands)


def _add_launch(commands: argparse._SubParsersAction) -> None:
    launch = commands.add_parser(
        "launch",
        help="submit a recipe to a SLURM cluster",
        description="Submit a recipe's jobs through nemo-run: training, which is queued again "
        "until it is done and goes on where it stood, and an evaluation. From .venv-launch, where "
        "nemo-run is: launch/setup/bootstrap.sh launch makes it.",
        epilog="example: megatron-nft launch launch/recipes/qwen2.5-32b.yaml --cluster mine.yaml "
        "--nodes 16 --dry-run",
    )
    add_recipe(launch)
    launch.add_argument(
        "--cluster",
        type=Path,
        required=True,
        metavar="CLUSTER.yaml",
        help="what your site wants to be told; launch/clusters/example.yaml shows all of it",
    )
    launch.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="that train (default: %(default)s)"
    )
    launch.add_argument(
        "--servers",
        type=int,
        default=0,
        metavar="N",
        help="further nodes of the job, a vLLM server each (default: %(default)s)",
    )
    launch.add_argument("--dry-run", action="store_true", help="print the scripts, submit nothing")
    launch.set_defaults(run=_launch)


def _add_looking(commands: argparse._SubParsersAction) -> None:
    status = commands.add_parser("status", help="how far a launched run is")
    status.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    status.set_defaults(run=_status)

    logs = commands.add_parser("logs", help="what a launched run's jobs said last")
    logs.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    logs.add_argument("--job", default="train", help="train or evaluate (default: %(default)s)")
    logs.add_argument(
        "-n", "--lines", type=int, default=40, metavar="N", help="default: %(default)s"
    )
    logs.add_argument("-f", "--follow", action="store_true", help="go on as more is said")
    logs.set_defaults(run=_logs)


def _add_node_check(commands: argparse._SubParsersAction) -> None:
    node_check = commands.add_parser(
        "node-check", help="whether a node is fit for a run; jobs call it on each"
    )
    node_check.add_argument("--folder", type=Path, required=True, metavar="DIR")
    node_check.add_argument("--gpus", type=int, default=0, metavar="N")
    node_check.add_argument("--min-free-gib", type=float, default=0.0, metavar="GIB")
    node_check.add_argument("--min-all-reduce", type=float, default=0.0, metavar="GIB_A_SECOND")
    node_check.set_defaults(run=_node_check)


def _launch(arguments: argparse.Namespace) -> int:
    from launch.submit import launch

    return launch(
        arguments.recipe,
        arguments.cluster,
        arguments.overrides,
        num_nodes=arguments.nodes,
        num_servers=arguments.servers,
        is_dry=arguments.dry_run,
    )


def _status(arguments: argparse.Namespace) -> int:
    from launch.jobs import status

    return status(arguments.run_dir)


def _logs(arguments: argparse.Namespace) -> int:
    from launch.jobs import logs

    options = {"num_lines": arguments.lines, "follow": arguments.follow}
    return logs(arguments.run_dir, arguments.job, **options)


def _node_check(arguments: argparse.Namespace) -> int:
    from megatron_nft.node_check import check

    options = arguments.gpus, arguments.min_free_gib, arguments.min_all_reduce
    return check(arguments.folder, *options)
