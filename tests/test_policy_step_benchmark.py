"""The throughput benchmark runs on any host, and counts the work that the formula says."""

import subprocess
import sys
from pathlib import Path

import pytest
from shapes import workload

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "policy_step.py"
TOKENS, MICRO_BATCHES, MEAN = 96, 2, 30.0
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY = 128, 256, 2, 4, 2, 512
FORBIDDEN = ("transformers", "safetensors", "omegaconf", "vllm")
ISOLATED = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({FORBIDDEN}))  # to import one of them is an error
sys.argv = sys.argv[1:]
sys.path.insert(0, {str(SCRIPT.parent)!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def tables(printed: str) -> list[list[dict[str, str]]]:
    """Every Markdown table as rows by column."""
    blocks = [block.splitlines() for block in printed.split("\n\n") if block.startswith("| ")]
    rows = [[[c.strip() for c in line.strip("|").split("|")] for line in b] for b in blocks]
    return [[dict(zip(head, row, strict=True)) for row in body] for head, _, *body in rows]


def forward_tflop() -> tuple[float, int]:
    """Of the script's sequences, and their tokens: 2 a weight and token, 4 a channel and pair."""
    sequences = workload(VOCABULARY, TOKENS, MEAN, 1, MICRO_BATCHES)
    lengths = [len(s.prompt) + len(s.response) - 1 for s in sequences]
    layer = HIDDEN * HIDDEN * (2 + 2 * KV_HEADS / HEADS) + 3 * HIDDEN * INTERMEDIATE
    flops = 2 * LAYERS * layer * sum(lengths)
    flops += 2 * HIDDEN * VOCABULARY * sum(len(s.response) for s in sequences)
    flops += 4 * LAYERS * HIDDEN * sum(n * n / 2 for n in lengths)
    return flops / 1e12, sum(lengths)


@pytest.mark.processes
def test_a_toy_is_measured_with_torch_and_megatron_core_alone() -> None:
    command = [sys.executable, "-c", ISOLATED, str(SCRIPT), "--models", "toy", "--repeats", "1"]
    command += ["--tokens", str(TOKENS), "--micro-batches", str(MICRO_BATCHES)]
    command += ["--mean", str(MEAN), "--peak", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr

    figures, parts = tables(done.stdout)
    tflop, num_tokens = forward_tflop()
    assert [row["pass"] for row in figures] == ["step", "old logp"]
    for row, num_passes in zip(figures, (3, 1), strict=True):
        seconds = float(row["s"])
        assert 0 < seconds < 60
        assert int(row["micro-batches"]) == MICRO_BATCHES
        assert float(row["TFLOP"]) == pytest.approx(num_passes * tflop, rel=1e-4)
        assert float(row["TFLOP/s"]) == pytest.approx(num_passes * tflop / seconds, rel=1e-2)
        tokens_per_second = float(row["tokens/s"].replace(",", ""))
        assert tokens_per_second == pytest.approx(num_tokens / seconds, rel=1e-2)
        assert 0 < float(row["MFU"].rstrip("%")) < 100
        assert 0.05 < float(row["peak GiB"]) < 8
        assert bool(row["planned GiB"]) is (num_passes == 3)
        assert float(row["× products"]) > 0

    seconds_of = [{k: float(v.split()[0]) for k, v in r.items() if " s, " in v} for r in parts]
    assert len(seconds_of[0]) == 8
    for found, row in zip(seconds_of, figures, strict=True):
        assert sum(found.values()) == pytest.approx(float(row["s"]), rel=0.2)
    assert all(s > 0 for s in seconds_of[0].values())
    assert seconds_of[1]["optimizer"] == seconds_of[1]["reduction"] == 0
    assert "Goals are for a GPU." in done.stdout
