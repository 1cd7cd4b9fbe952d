"""The command line of conversion: `megatron-nft convert hf-to-megatron|megatron-to-hf|…`."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

EPILOG = """\
examples:
  megatron-nft convert hf-to-megatron --hf Qwen2.5-7B --out qwen-megatron
  megatron-nft convert megatron-to-hf --checkpoint runs/a/checkpoints/rollout_40 --out model
  megatron-nft convert compare Qwen2.5-7B qwen-megatron --logits
  megatron-nft convert inspect qwen-megatron
"""
TEXT = "The quick brown fox jumps over the lazy dog. 12 + 34 = 46, and so 2 * 23 = 46."


def add_parser(commands: Any) -> None:
    """Add `convert` to the program's commands."""
    convert = commands.add_parser(
        "convert",
        help="checkpoints from Hugging Face to Megatron-Core and back",
        description="Convert checkpoints file to file: no GPU, no model in memory.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = convert.add_subparsers(required=True, metavar="VERB")
    _add_to_megatron(verbs)
    _add_to_hf(verbs)
    _add_compare(verbs)
    _add_inspect(verbs)


def _add_to_megatron(verbs: Any) -> None:
    parser = verbs.add_parser(
        "hf-to-megatron",
        help="a Hugging Face directory to a Megatron-Core distributed checkpoint",
        description="Write a Megatron-Core distributed checkpoint (torch_dist) that loads at any "
        "TP, PP, VPP and EP. The dtype stays as it is.",
    )
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="the model")
    _add_common(parser)
    parser.set_defaults(run=_speaking(_to_megatron))


def _add_to_hf(verbs: Any) -> None:
    parser = verbs.add_parser(
        "megatron-to-hf",
        help="a Megatron-Core distributed checkpoint to a Hugging Face directory",
        description="Write safetensors shards with configuration, tokenizer and chat template. A "
        "training run's checkpoints can be converted too; their optimizer is left out.",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    _add_hf(parser)
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the weights (default: the checkpoint's; bfloat16 beside --fp8)",
    )
    parser.add_argument(
        "--fp8",
        choices=("block", "tensor"),
        help="projections in FP8 for serving, with a scale for each 128×128 block or tensor",
    )
    _add_common(parser)
    parser.set_defaults(run=_speaking(_to_hf))


def _add_compare(verbs: Any) -> None:
    parser = verbs.add_parser(
        "compare",
        help="are two checkpoints, of either form, the same model?",
        description="Compare what decides the numbers: settings, names, shapes, dtypes and bits. "
        "Exit code 1 where they differ.",
    )
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    _add_hf(parser)
    parser.add_argument(
        "--logits",
        nargs="?",
        const=TEXT,
        metavar="TEXT",
        help="also run both models in float32 on TEXT (a sentence of its own by default)",
    )
    _add_workers(parser)
    parser.set_defaults(run=_speaking(_compare))


def _add_inspect(verbs: Any) -> None:
    parser = verbs.add_parser(
        "inspect",
        help="what a checkpoint holds, and whether it is complete",
        description="Family, sizes, dtypes, layout, step. Exit code 1 where it is incomplete.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    _add_hf(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=_speaking(_inspect))


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a new directory; must not exist"
    )
    parser.add_argument(
        "--allow-nonfinite",
        action="store_true",
        help="go on where weights are NaN or infinite (they are named)",
    )
    _add_workers(parser)


def _add_hf(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hf",
        type=Path,
        metavar="DIR",
        help="the original model, for a Megatron checkpoint without configuration and tokenizer",
    )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=_positive,
        default=min(8, len(os.sched_getaffinity(0))),
        metavar="N",
        help="threads that read, check and write (default: %(default)s)",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"was {text}; it may be 1 or more")
    return number


def _speaking(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """What the file system refuses is the user's to mend: say it in one line."""

    def speaking(arguments: argparse.Namespace) -> int:
        try:
            return run(arguments)
        except OSError as error:
            raise ValueError(f"{error.filename}: {error.strerror}") from error

    return speaking


def _to_megatron(arguments: argparse.Namespace) -> int:
    from checkpoints_conversion.convert import hf_to_megatron

    found = hf_to_megatron(
        arguments.hf,
        arguments.out,
        workers=arguments.workers,
        allows_nonfinite=arguments.allow_nonfinite,
    )
    return _tell(arguments.out, found)


def _to_hf(arguments: argparse.Namespace) -> int:
    from checkpoints_conversion.convert import megatron_to_hf

    found = megatron_to_hf(
        arguments.checkpoint,
        arguments.out,
        hf=arguments.hf,
        dtype=arguments.dtype,
        scheme=arguments.fp8,
        workers=arguments.workers,
        allows_nonfinite=arguments.allow_nonfinite,
    )
    return _tell(arguments.out, found)


def _tell(out: Path, nonfinite: list[str]) -> int:
    if nonfinite:
        print(f"NaN or infinite weights in {', '.join(nonfinite)}")
    print(out)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from checkpoints_conversion.checkpoint import open_checkpoint
    from checkpoints_conversion.compare import compare

    a, b = (open_checkpoint(path, arguments.hf) for path in (arguments.a, arguments.b))
    result = compare(a, b, arguments.workers)
    print("\n".join(result.lines()))
    if arguments.logits is not None:
        from checkpoints_conversion.outputs import compare_outputs

        print(compare_outputs(a, b, arguments.logits).line())
    print("equal" if result.is_equal else "different")
    return 0 if result.is_equal else 1


def _inspect(arguments: argparse.Namespace) -> int:
    from checkpoints_conversion.inspection import inspect

    found = inspect(arguments.directory, arguments.hf)
    if arguments.json:
        print(json.dumps(found))
    else:
        width = max(map(len, found))
        print("\n".join(f"{key:<{width}}  {_text(value)}" for key, value in found.items()))
    return 0 if found["complete"] else 1


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
