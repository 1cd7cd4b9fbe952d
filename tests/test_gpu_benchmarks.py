"""The benchmarks that are for a GPU run on any host at toy size, and print what they say."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def printed(script: str, *words: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def tables(text: str) -> list[list[dict[str, str]]]:
    """Every Markdown table as rows by column."""
    text = text.replace("\\|", "¦")
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    rows = [[[c.strip() for c in line.strip("|").split("|")] for line in b] for b in blocks]
    return [[dict(zip(head, row, strict=True)) for row in body] for head, _, *body in rows]


@pytest.mark.processes
def test_a_loop_of_strangers_is_measured() -> None:
    """Answers of random models end by chance, about as long as was asked for."""
    words = "--models", "toy", "--rollouts", "2", "--answer-tokens", "30", "--gpu", "h200"
    seconds, memory = tables(printed("whole_loop.py", *words))
    measured, planned = seconds
    assert planned["seconds of a rollout"] == "planned"
    for row in seconds:
        phases = [float(row[name]) for name in ("sampling", "old logp", "training", "weights")]
        assert float(row["all"]) == pytest.approx(sum(phases), abs=0.03)
    assert float(measured["sampling"]) > 0
    [row] = memory
    assert float(row["tokens/answer"]) == pytest.approx(30, rel=0.35)
    assert 0 < float(row["mean ¦Δlogp¦"]) < 1e-5
    assert float(row["GB/s"]) > 0


@pytest.mark.processes
def test_errors_of_bfloat16_are_measured() -> None:
    words = "--parts", "errors", "imitation", "--steps", "10", "--shape", "toy"
    errors, imitation = tables(printed("precision.py", *words, "--kinds", "bfloat16"))
    [rounded] = errors
    assert rounded["against"] == "float32"
    assert 1e-4 < float(rounded["mean ¦Δlogp¦"]) < 1e-2
    assert 1e-3 < float(rounded["gradient off by"]) < 3e-2
    assert 0.999 < float(rounded["cosine"]) < 1
    [learnt] = imitation
    assert float(learnt["last loss"]) < float(learnt["first loss"]) - 0.5
