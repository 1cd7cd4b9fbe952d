"""The command `megatron-nft train`, whole: sampling, judging, training, resuming, exporting."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_nft import arithmetic
from megatron_nft.metrics import read_metrics

RECIPE = """
rollouts: 2
model: {{path: {root}/model, dtype: float32}}
parallel: {{tensor: 2}}
data: {{train: [{{path: {root}/data/train.jsonl}}], template: raw, max_prompt_tokens: 10}}
rollout: {{questions: 4, questions_asked: 8, answers: 4, max_response_tokens: 42}}
optimizer: {{lr: 1.0e-3, warmup_rollouts: 1, questions_per_minibatch: 2, tokens_per_microbatch: 512}}
evaluate: {{sets: [{{path: {root}/data/heldout.jsonl, samples: 2}}], every: 1, top_p: 1.0}}
checkpoint: {{every: 1}}
"""
VOLATILE = ("seconds/", "tokens_per_second", "peak_memory")


def megatron_nft(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would."""
    command = [sys.executable, "-m", "megatron_nft", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


def lasting(run_dir: Path) -> list[dict]:
    """A run's metrics without what no two runs share."""
    return [
        {k: v for k, v in record.items() if not k.startswith(VOLATILE)}
        for record in read_metrics(run_dir)
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random model, its task, and a cold start that solves a few sums."""
    root = tmp_path_factory.mktemp("train")
    arithmetic.write_problems(root / "data", seed=0, num_train=4000, num_heldout=16)
    arithmetic.make_model(root / "model", seed=0)
    (root / "recipe.yaml").write_text(RECIPE.format(root=root))
    return root
