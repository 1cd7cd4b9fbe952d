"""The whole program in minutes on two CPU cores: a tiny Qwen2 learns sums from its own answers."""

import os
import time
from importlib.resources import files
from pathlib import Path

from tqdm import tqdm

from megatron_nft import processes, report
from megatron_nft.metrics import read_metrics

RECIPES = Path(str(files("launch"))) / "recipes"
STAGES = "task and random model", "cold start on worked solutions", "NFT on its own answers"


def demo(out: Path, seed: int) -> int:
    """Make the task, cold-start, run NFT, draw; 0, or the exit code of the stage that failed."""
    start = time.monotonic()
    _announce(1)
    make_task(out, seed)
    for stage, (recipe, model, run, data) in enumerate(
        (
            ("demo-cold-start.yaml", "model", "cold-start", "demonstrations"),
            ("demo.yaml", "cold-start/hf", "nft", "train"),
        ),
        start=2,
    ):
        _announce(stage)
        overrides = [f"seed={seed}", f"run_dir={out / run}", f"model.path={out / model}"]
        overrides += [f"data.train[0].path={out / 'data' / f'{data}.jsonl'}"]
        if processes.num_gpus() == 1:
            overrides += ["parallel.tensor=1"]
        overrides += [f"evaluate.sets[0].path={out / 'data' / 'heldout.jsonl'}"]
        if code := processes.run(RECIPES / recipe, overrides):
            return code
    _conclude(out, time.monotonic() - start)
    return 0


def make_task(out: Path, seed: int) -> None:
    """Problems, tokenizer and random model, unless they are there already."""
    from megatron_nft import arithmetic

    if (out / "model" / "tokenizer.json").is_file():  # written last
        return
    with tqdm(total=2, desc="making", unit="part") as bar:
        arithmetic.write_problems(out / "data", seed)
        bar.update()
        arithmetic.make_model(out / "model", seed)
        bar.update()


def _announce(stage: int) -> None:
    print(f"\n[{stage}/{len(STAGES)}] {STAGES[stage - 1]}", flush=True)


def _conclude(out: Path, seconds: float) -> None:
    records = read_metrics(out / "nft")
    accuracies = [r["eval/heldout/accuracy"] for r in records if "eval/heldout/accuracy" in r]
    picture = report.draw(out / "nft", out / "demo.png", title="megatron-nft demo")
    print(
        f"\nheld-out accuracy (avg@8): {accuracies[0]:.1%} before NFT, {accuracies[-1]:.1%} after"
        f"\nthe trained model: {out / 'nft' / 'hf'} (Hugging Face)"
        f"\nthe run's picture: {picture}"
        f"\n{seconds:.0f} seconds on {os.cpu_count()} cores"
    )
