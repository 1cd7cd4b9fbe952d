"""How far a step in each parallel layout is from plain PyTorch: the largest relative differences.

    .venv/bin/python benchmarks/layouts.py [--processes 1 2 4 8]

What is compared, and with what, is tests/test_step.py's; the tests allow 1e-5 everywhere. Weights
and gradients are compared parameter by parameter, by norm.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import test_step
from processes import run
from reference import distance, reference, worst

from megatron_nft.config import ParallelConfig

LAYOUTS = test_step.LAYOUTS | {
    8: {  # 8 GB of memory: not among the tests
        "TP2·PP2·CP2": {"tensor": 2, "pipeline": 2, "context": 2},
        "TP2·SP·PP2·VPP2·CP2": {
            "tensor": 2,
            "sequence": True,
            "pipeline": 2,
            "virtual_pipeline": 2,
            "context": 2,
        },
    }
}
COLUMNS = ("layout", "processes", "loss", "gradient norm", "updated weight", "gradient")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2, 4], choices=list(LAYOUTS)
    )
    counts = parser.parse_args().processes
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---|" + "---:|" * (len(COLUMNS) - 1))
    with tempfile.TemporaryDirectory() as folder:
        models = test_step.save_models(Path(folder))
        for count in counts:
            configs = [ParallelConfig(**options) for options in LAYOUTS[count].values()]
            results = run(test_step.everything, count, models, configs, True)[0]
            for name, config, result in zip(LAYOUTS[count], configs, results, strict=True):
                paths = models[test_step.num_layers(config)]
                figures = " | ".join(f"{x:.1e}" for x in _worst(paths, result))
                print(f"| {name} | {count} | {figures} |", flush=True)


def _worst(paths: list[Path], result: dict[str, Any]) -> tuple[float, ...]:
    """Over all objectives, tied and untied; the gradient over all its variants."""
    pairs = [
        (step, reference(path, test_step.OBJECTIVES[name]))
        for path, steps in zip(paths, result["steps"], strict=True)
        for name, step in steps.items()
    ]
    exact = reference(paths[0], test_step.NFT)["gradient"]
    return (
        max(abs(ours["loss"] / exact["loss"] - 1) for ours, exact in pairs),
        max(abs(ours["grad_norm"] / exact["grad_norm"] - 1) for ours, exact in pairs),
        max(
            distance({name: weight}, {name: exact["weights"][name]})
            for ours, exact in pairs
            for name, weight in ours["weights"].items()
        ),
        max(worst(gradient, exact) for gradient in result["variants"].values()),
    )


if __name__ == "__main__":
    main()
