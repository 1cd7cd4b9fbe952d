"""The demo over several seeds: accuracy before and after, agreement, and time.

    .venv/bin/python benchmarks/demo.py --seeds 0 1 2

Accuracy is avg@8 on 128 held-out sums; |Δlogp| is between trainer and engine, the largest over the
run; the export's is between trainer and transformers.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tables

from megatron_nft.metrics import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    columns = "seed", "before", "after", "NFT rollouts", "engine |Δlogp|", "export |Δlogp|", "s"
    print(tables.head(columns))
    for seed in seeds:
        with tempfile.TemporaryDirectory() as out:
            print(tables.row(measured(seed, Path(out))), flush=True)


def measured(seed: int, out: Path) -> list[str]:
    """Run the demo in a directory of its own; its cells of the table."""
    start = time.monotonic()
    command = [sys.executable, "-m", "megatron_nft", "demo", "--out", str(out), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.monotonic() - start
    records = read_metrics(out / "nft")
    accuracies = [r["eval/heldout/accuracy"] for r in records if "eval/heldout/accuracy" in r]
    drift = max(r["logp_delta_max"] for r in records if "logp_delta_max" in r)
    export = re.search(r"max \|Δlogp\| (\S+)", done.stdout + done.stderr).group(1)
    shares = [f"{accuracy:.1%}" for accuracy in (accuracies[0], accuracies[-1])]
    numbers = f"{drift:.1e}", export, f"{seconds:.0f}"
    return [str(seed), *shares, str(records[-1]["rollout"]), *numbers]


if __name__ == "__main__":
    main()
