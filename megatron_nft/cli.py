"""The command line: `megatron-nft demo|train|evaluate|launch|…`."""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from checkpoints_conversion import commands as conversion
from megatron_nft import __version__
from megatron_nft.nodes import MEETING_PORT, Nodes

UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID"  # LOCAL_RANK is set by containers' Slurm hooks too

DESCRIPTION = """\
Negative-aware Fine-Tuning (NFT, arXiv 2505.18116): a language model learns from its own
verified answers, right and wrong."""


def main() -> None:
    """Run one command; a mistake of the user's is one line and exit code 2."""
    arguments = _arguments(_parser())
    try:
        sys.exit(arguments.run(arguments))
    except ValueError as error:
        if UNDER_TORCHRUN in os.environ:
            raise  # torchrun reports what its processes raise
        sys.exit(_complain(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)


def _arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Overrides may stand anywhere, also after options: argparse takes them in one place alone."""
    arguments, rest = parser.parse_known_args()
    strange = [word for word in rest if word.startswith("-") or "=" not in word]
    if strange or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(strange or rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-nft", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"megatron-nft {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="the whole thing in minutes on two CPU cores",
        description="Teach a tiny Qwen2 sums: cold start, then NFT on its own verified answers.",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="where everything is written; started again, it resumes (default: %(default)s)",
    )
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    demo.set_defaults(run=_demo)

    train = commands.add_parser(
        "train",
        help="run a recipe, or go on with it where it was interrupted",
        description="Run a recipe. Starts its own processes unless torchrun has already; started "
        "again in the same run directory, it resumes.",
        epilog="example: megatron-nft train recipe.yaml run_dir=runs/a optimizer.lr=2e-6",
    )
    train.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="replace recipe values")
    several = train.add_argument_group("several nodes", "the same command on each of them")
    several.add_argument("--nodes", type=int, default=1, metavar="N", help="default: %(default)s")
    several.add_argument(
        "--node-rank", type=int, default=0, metavar="R", help="of this one: 0 to N - 1"
    )
    several.add_argument(
        "--meeting",
        default="",
        metavar="HOST[:PORT]",
        help=f"of node 0, which needs the next port too (default port: {MEETING_PORT})",
    )
    several.add_argument(
        "--node-names", default="", metavar="A,B,…", help="by their rank, for messages"
    )
    several.add_argument(
        "--start-timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds until a node that did not come ends the others (default: %(default)g)",
    )
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "evaluate",
        help="accuracy of a model on a recipe's evaluation sets",
        description="Evaluate a model as a recipe says, on this machine: what its run exported "
        "(RUN_DIR/hf), or another. The numbers are printed, and left in RUN_DIR/evaluation.",
        epilog="example: megatron-nft evaluate recipe.yaml evaluate.temperature=0.6",
    )
    evaluate.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="replace recipe values")
    evaluate.add_argument("--model", type=Path, metavar="DIR", help="default: RUN_DIR/hf")
    evaluate.set_defaults(run=_evaluate)

    _add_launching(commands)

    plan = commands.add_parser(
        "plan",
        help="whether a recipe fits its GPUs, worked out without one",
        description="Work out, without a GPU, what a recipe needs of each one's memory: weights, "
        "gradients, optimizer and the engine's weights exactly, activations by an estimate that "
        "has not been compared with a GPU's yet. Suggests layouts that fit where this one does "
        "not, and names what is missing. Exit code 1 where it cannot run.",
        epilog="example: megatron-nft plan launch/recipes/qwen2.5-32b.yaml --gpus 128 --gpu h100",
    )
    plan.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="replace recipe values")
    plan.add_argument("--gpus", type=int, default=8, metavar="N", help="default: %(default)s")
    plan.add_argument("--gpu", default="h100", help="h100, h200 or b200 (default: %(default)s)")
    plan.set_defaults(run=_plan)

    serve = commands.add_parser(
        "serve",
        help="start a vLLM server for a run on another node",
        description="Start a vLLM server that the recipe's run can use (rollout.servers). It asks "
        "nobody who they are: listen on the job's own network alone.",
        epilog="example: megatron-nft serve recipe.yaml --host node7 --port 8000",
    )
    serve.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    serve.add_argument("overrides", nargs="*", metavar="key=value", help="replace recipe values")
    serve.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    serve.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    serve.set_defaults(run=_serve)

    conversion.add_parser(commands)

    report = commands.add_parser(
        "report",
        help="draw a run's curves",
        description="Draw a run's accuracy, entropy, lengths, drift and time as one picture.",
    )
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    report.add_argument("--out", type=Path, metavar="FILE.png", help="default: RUN_DIR/report.png")
    report.set_defaults(run=_report)
    return parser


def _add_launching(commands: argparse._SubParsersAction) -> None:
    launch = commands.add_parser(
        "launch",
        help="submit a recipe to a SLURM cluster",
        description="Submit a recipe's jobs through nemo-run: training, which is queued again "
        "until it is done and goes on where it stood, and an evaluation. From .venv-launch, where "
        "nemo-run is: launch/setup/bootstrap.sh launch makes it.",
        epilog="example: megatron-nft launch launch/recipes/qwen2.5-32b.yaml --cluster mine.yaml "
        "--nodes 16 --dry-run",
    )
    launch.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    launch.add_argument("overrides", nargs="*", metavar="key=value", help="replace recipe values")
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

    doctor = commands.add_parser(
        "doctor",
        help="what this environment can do, and what mends it",
        description="Versions and builds found, what is fast here, combinations known to be bad; "
        "for each trouble the command that mends it. Exit code 1 where a run cannot start.",
    )
    doctor.set_defaults(run=_doctor)

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


def _doctor(_arguments: argparse.Namespace) -> int:
    from megatron_nft.doctor import doctor

    return doctor()


def _node_check(arguments: argparse.Namespace) -> int:
    from megatron_nft.node_check import check

    options = arguments.gpus, arguments.min_free_gib, arguments.min_all_reduce
    return check(arguments.folder, *options)


def _demo(arguments: argparse.Namespace) -> int:
    from megatron_nft.demo import demo

    return demo(arguments.out, arguments.seed)


def _under_torchrun(arguments: argparse.Namespace, verb: str) -> int:
    from megatron_nft.processes import end_with_parent

    end_with_parent()  # before the seconds of imports
    from megatron_nft.train import run_process

    return run_process(arguments.recipe, arguments.overrides, verb)


def _evaluate(arguments: argparse.Namespace) -> int:
    if UNDER_TORCHRUN in os.environ:
        return _under_torchrun(arguments, "evaluate")
    from megatron_nft.processes import evaluate

    return evaluate(arguments.recipe, arguments.overrides, arguments.model)


def _train(arguments: argparse.Namespace) -> int:
    if UNDER_TORCHRUN in os.environ:
        return _under_torchrun(arguments, "train")
    from megatron_nft.processes import run

    nodes = Nodes(
        arguments.nodes,
        arguments.node_rank,
        arguments.meeting,
        tuple(filter(None, arguments.node_names.split(","))),
        arguments.start_timeout,
    )
    return run(arguments.recipe, arguments.overrides, nodes)


def _plan(arguments: argparse.Namespace) -> int:
    from megatron_nft.plan.plan import plan

    return plan(arguments.recipe, arguments.gpus, arguments.gpu, arguments.overrides)


def _serve(arguments: argparse.Namespace) -> NoReturn:
    from megatron_nft.processes import serve

    serve(arguments.recipe, arguments.overrides, arguments.host, arguments.port)


def _report(arguments: argparse.Namespace) -> int:
    from megatron_nft.report import draw

    print(draw(arguments.run_dir, arguments.out))
    return 0


def _complain(message: str) -> int:
    print(f"megatron-nft: error: {message}", file=sys.stderr)
    return 2
