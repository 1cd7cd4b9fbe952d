"""Whole runs of a small model that has seen sums: what the tests of `megatron-nft train` share."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

from megatron_nft import arithmetic
from megatron_nft.metrics import read_metrics

VOLATILE = ("seconds/", "tokens_per_second", "peak_memory", "engine_gib", "device_gib")
COLD_START = """
run_dir: {root}/cold
rollouts: 60
model: {{path: {root}/model, dtype: float32}}
parallel: {{tensor: {tensor}}}
data: {{train: [{{path: {root}/cold.jsonl}}], template: raw, max_prompt_tokens: {longest}}}
objective: {{name: sft}}
rollout: {{questions: 32, max_response_tokens: 12}}
optimizer: {{lr: 2.0e-3, warmup_rollouts: 5, questions_per_minibatch: 32}}
checkpoint: {{every: 0}}
"""
RECIPE = """
run_dir: {root}/nft
rollouts: 4
model: {{path: {root}/cold/hf, dtype: float32}}
parallel: {{tensor: 2}}
data: {{train: [{{path: {root}/cold.jsonl}}], template: raw, max_prompt_tokens: 8}}
rollout: {{questions: 8, questions_asked: 24, answers: 8, max_response_tokens: 12}}
optimizer: {{lr: 1.0e-3, warmup_rollouts: 1, questions_per_minibatch: 4, tokens_per_microbatch: 99}}
evaluate:
  sets:
    - {{path: {root}/cold.jsonl, name: sums, samples: 2}}
    - {{path: {root}/cold.jsonl, name: once, samples: 1}}
  every: 2
  top_p: 1.0
checkpoint: {{every: 1, check_export: true}}
"""


def command(recipe: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "megatron_nft", "train", str(recipe), *overrides]


def train(recipe: Path, *overrides: str) -> None:
    """`megatron-nft train`, as a user would."""
    done = subprocess.run(command(recipe, *overrides), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr


def lasting(run_dir: Path) -> list[dict]:
    """A run's metrics without what no two runs share."""
    return [
        {k: v for k, v in record.items() if not k.startswith(VOLATILE)}
        for record in read_metrics(run_dir)
    ]


def write_rows(path: Path, rows: list[tuple[str, str]]) -> None:
    lines = [
        json.dumps({"question": q, "answer": a, "solution": f"\\boxed{{{a}}}"}) for q, a in rows
    ]
    path.write_text("\n".join(lines) + "\n")


def prepare_model(root: Path) -> None:
    """A small model that has seen one-digit sums for a while, and the recipe to go on."""
    write_rows(
        root / "cold.jsonl", [(f"{a}+{b}=", str(a + b)) for a, b in product(range(10), repeat=2)]
    )
    arithmetic.make_model(root / "model", seed=0)
    (root / "cold.yaml").write_text(COLD_START.format(root=root, tensor=2, longest=8))
    (root / "recipe.yaml").write_text(RECIPE.format(root=root))
    train(root / "cold.yaml")


def prepare(root: Path) -> None:
    """The same, and a run by that recipe, `nft`."""
    prepare_model(root)
    train(root / "recipe.yaml")
