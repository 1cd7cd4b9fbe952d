"""The benchmarks that are for a GPU run on any host at toy size, and print what they say."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def printed(script: str, *words: str) -> str:
    done = run(script, *words)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def tables(text: str) -> list[list[dict[str, str]]]:
    """Every Markdown table as rows by column."""
    text = text.replace("\\|", "¦")
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    rows = [[[c.strip() for c in line.strip("|").split("|")] for line in b] for b in blocks]
    return [[dict(zip(head, row, strict=False)) for row in body] for head, _, *body in rows]


@pytest.mark.processes
def test_a_loop_of_strangers_is_measured() -> None:
    """Answers of random models end by chance, about as long as was asked for."""
    words = ["--models", "toy", "--layers", "2", "--dtype", "float32", "--micro-batch", "512"]
    words += ["--questions", "8", "--answer-tokens", "30", "--longest", "128", "--gpu", "h200"]
    seconds, memory = tables(printed("whole_loop.py", *words))
    measured, planned = seconds
    assert planned["seconds of a rollout"] == "planned"
    phases = ["sampling", "old logp", "training", "weights", "memory", "between"]
    spent = {name: float(measured[name]) for name in phases}
    assert sum(spent.values()) == pytest.approx(float(measured["whole"]), rel=0.2)
    assert spent["sampling"] > 0
    assert spent["training"] > 0
    [row] = memory
    assert float(row["tokens/answer"]) == pytest.approx(30, rel=0.35)
    # a GPU may multiply in TF32
    assert 0 < float(row["mean ¦Δlogp¦"]) < (1e-2 if torch.cuda.is_available() else 1e-5)
    assert float(row["GB/s"]) > 0


@pytest.mark.processes
def test_errors_of_bfloat16_are_measured_also_beside_what_cannot_run_here() -> None:
    words = ["--parts", "errors", "imitation", "--steps", "10", "--shape", "toy", "--layers", "2"]
    words += ["--tokens", "512", "--mean", "100", "--kinds", "te", "bfloat16"]
    done = run("precision.py", *words)
    errors, imitation = tables(done.stdout)
    rounded = next(row for row in errors if row[""] == "bfloat16")
    assert rounded["against"] == "float32"
    assert 1e-4 < float(rounded["mean ¦Δlogp¦"]) < 1e-2
    assert 1e-3 < float(rounded["gradient off by"]) < 3e-2
    assert 0.999 < float(rounded["cosine"]) < 1
    of_te, learnt = imitation
    assert float(learnt["last loss"]) < float(learnt["first loss"]) - 0.5
    assert learnt["skipped"] == "0"
    if not torch.cuda.is_available():
        assert done.returncode == 1
        assert [of_te["first loss"], errors[-1]["against"]] == ["failed", ""]
        assert "model.layers=transformer_engine" in done.stderr
        assert done.stderr.endswith("failed: te; te, seed 0\n")
