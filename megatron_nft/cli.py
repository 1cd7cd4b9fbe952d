"""The command line: `megatron-nft demo|train|serve|convert|report`."""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from checkpoints_conversion import commands as conversion
from megatron_nft import __version__

DESCRIPTION = """\
Negative-aware Fine-Tuning (NFT, arXiv 2505.18116): a language model learns from its own
verified answers, right and wrong."""


def main() -> None:
    """Run one command; a mistake of the user's is one line and exit code 2."""
    arguments = _parser().parse_args()
    try:
        sys.exit(arguments.run(arguments))
    except ValueError as error:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            raise  # torchrun reports what its processes raise
        sys.exit(_complain(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)


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
    train.set_defaults(run=_train)

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


def _demo(arguments: argparse.Namespace) -> int:
    from megatron_nft.demo import demo

    return demo(arguments.out, arguments.seed)


def _train(arguments: argparse.Namespace) -> int:
    if "LOCAL_RANK" in os.environ:  # under torchrun
        from megatron_nft.processes import end_with_parent

        end_with_parent()  # before the seconds of imports
        from megatron_nft.train import run_process

        return run_process(arguments.recipe, arguments.overrides)
    from megatron_nft.processes import run

    return run(arguments.recipe, arguments.overrides)


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
