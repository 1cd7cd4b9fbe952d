"""The command line: `megatron-nft demo|train|evaluate|launch|…`."""

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import NoReturn

from checkpoints_conversion import commands as conversion
from launch import commands as launching
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

    for add in (_add_demo, _add_train, _add_evaluate, _add_plan, _add_serve, _add_report):
        add(commands)
    launching.add_parsers(commands)
    conversion.add_parser(commands)
    _add_doctor(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
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


def _add_train(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser(
        "train",
        help="run a recipe, or go on with it where it was interrupted",
        description="Run a recipe. Starts its own processes unless torchrun has already; started "
        "again in the same run directory, it resumes.",
        epilog="example: megatron-nft train recipe.yaml run_dir=runs/a optimizer.lr=2e-6",
    )
    launching.add_recipe(train)
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


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="accuracy of a model on a recipe's evaluation sets",
        description="Evaluate a model as a recipe says, on this machine: what its run exported "
        "(RUN_DIR/hf), or another. The numbers are printed, and left in RUN_DIR/evaluation.",
        epilog="example: megatron-nft evaluate recipe.yaml evaluate.temperature=0.6",
    )
    launching.add_recipe(evaluate)
    evaluate.add_argument("--model", type=Path, metavar="DIR", help="default: RUN_DIR/hf")
    evaluate.set_defaults(run=_evaluate)


def _add_plan(commands: argparse._SubParsersAction) -> None:
    plan = commands.add_parser(
        "plan",
        help="whether a recipe fits its GPUs and how long it takes, worked out without one",
        description="Work out, without a GPU, what a recipe needs of each one's memory (weights, "
        "gradients, optimizer and the engine's weights exactly; activations by an estimate that "
        "has not been compared with a GPU's yet), the seconds of a rollout's phases and what the "
        "GPUs send each other, by a roofline from measured and published rates, and the days and "
        "GPU-hours of the recipe. Suggests layouts that fit, or are faster, and names what is "
        "missing. Exit code 1 where it cannot run.",
        epilog="example: megatron-nft plan launch/recipes/qwen2.5-32b.yaml --gpus 128 --gpu h100",
    )
    launching.add_recipe(plan)
    add = plan.add_argument
    add("--gpus", type=int, default=8, metavar="N", help="that train (default: %(default)s)")
    add("--gpu", default="h100", help="h100, h200 or b200 (default: %(default)s)")
    add("--answer-tokens", type=float, default=0, metavar="N", help="mean (default: the most / 3)")
    add("--prompt-tokens", type=float, default=0, metavar="N", help="mean (default: 200)")
    add("--mixed", type=float, default=0.5, metavar="F", help="of groups (default: %(default)s)")
    plan.set_defaults(run=_plan)


def _add_serve(commands: argparse._SubParsersAction) -> None:
    serve = commands.add_parser(
        "serve",
        help="start a vLLM server for a run on another node",
        description="Start a vLLM server that the recipe's run can use (rollout.servers). It asks "
        "nobody who they are: listen on the job's own network alone.",
        epilog="example: megatron-nft serve recipe.yaml --host node7 --port 8000",
    )
    launching.add_recipe(serve)
    serve.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    serve.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    serve.set_defaults(run=_serve)


def _add_report(commands: argparse._SubParsersAction) -> None:
    report = commands.add_parser(
        "report",
        help="draw a run's curves",
        description="Draw a run's accuracy, entropy, lengths, drift and time as one picture.",
    )
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    report.add_argument("--out", type=Path, metavar="FILE.png", help="default: RUN_DIR/report.png")
    report.set_defaults(run=_report)


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="what this environment can do, and what mends it",
        description="Versions and builds found, what is fast here, combinations known to be bad; "
        "for each trouble the command that mends it. Exit code 1 where a run cannot start.",
    )
    doctor.set_defaults(run=_doctor)


def _demo(arguments: argparse.Namespace) -> int:
    from megatron_nft.demo import demo

    return demo(arguments.out, arguments.seed)


def _doctor(_arguments: argparse.Namespace) -> int:
    from megatron_nft.doctor import doctor

    return doctor()


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
    # what Megatron says of kernels that this machine lacks: a plan is for another one
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    from megatron_nft.plan.plan import Asked, plan

    asked = Asked(
        arguments.gpus,
        arguments.gpu,
        arguments.answer_tokens,
        arguments.prompt_tokens,
        arguments.mixed,
    )
    return plan(arguments.recipe, asked, arguments.overrides)


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
