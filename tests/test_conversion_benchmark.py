"""The conversion benchmark runs at toy size, and its table holds what it says."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "conversion.py"
GB = 0.03
# of hidden size 512: embedding and head of 8,192; a layer with 8 heads and 2 key-value heads of 64
EMBEDDINGS, LAYER = 2 * 8192 * 512, 512 * (2 * 512 + 2 * 128 + 3 * 1408) + 768 + 2 * 512


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def table(printed: str) -> dict[str, dict[str, str]]:
    """The Markdown table as cells by operation and column."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


@pytest.mark.processes
def test_a_toy_is_converted_there_and_back_and_measured(tmp_path: Path) -> None:
    done = run("--gb", str(GB), "--repeats", "2", "--dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Round trip: the same, bit by bit" in done.stdout
    assert not list(tmp_path.iterdir())  # everything is removed

    num_layers = round((GB * 1e9 / 2 - EMBEDDINGS) / LAYER)
    num_bytes = 2 * (EMBEDDINGS + num_layers * LAYER + 512)
    assert f"{num_bytes / 1e9:.2f} GB in {12 * num_layers + 3} tensors" in done.stdout

    rows = table(done.stdout)
    base = {
        "transformers, HF to HF": "cp of the HF directory",
        "HF to Megatron": "cp of the HF directory",
        "Megatron to HF": "cp of the Megatron checkpoint",
    }
    assert rows.keys() == {*base, *base.values()}
    for name, cp in base.items():
        row, seconds = rows[name], float(rows[name]["s"])
        least, most = map(float, row["least–most"].split("–"))
        assert 0 < least <= seconds <= most < 60
        assert float(row["GB/s"]) == pytest.approx(num_bytes / 1e9 / seconds, rel=0.2, abs=0.01)
        assert float(row["× cp"]) == pytest.approx(float(rows[cp]["s"]) / seconds, rel=0.5, abs=0.1)
        assert float(row["process s"]) > seconds  # Python starts and imports
        assert 0.3 < float(row["peak GB"]) < 2.5
    assert done.stdout.count("at most 2.5 GB: met") == 2


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    done = run("--gb", "1e5", "--dir", str(tmp_path))
    assert done.returncode == 1
    assert f"{tmp_path} has " in done.stderr
    assert "--gb" in done.stderr
    assert not list(tmp_path.iterdir())
