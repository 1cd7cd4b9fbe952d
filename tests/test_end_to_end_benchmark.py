"""The end-to-end benchmark runs at toy size, and its models answer as it says."""

import subprocess
import sys
from pathlib import Path

import pupil
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from megatron_nft.arithmetic import make_tokenizer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LEAST_TOKENS, MOST_TOKENS = 4, 28  # of an answer, all lengths equally likely


def tables(printed: str) -> list[dict[str, str]]:
    """The first row of every Markdown table, by column."""
    blocks = [block.splitlines() for block in printed.split("\n\n") if block.strip()[:1] == "|"]
    cells = [[[c.strip() for c in line.strip("|").split("|")] for line in b if b] for b in blocks]
    return [dict(zip(rows[0], rows[2], strict=True)) for rows in cells]


def test_a_grown_model_gives_the_same_log_probabilities(tmp_path: Path) -> None:
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    small = Qwen2ForCausalLM(config)
    small.save_pretrained(tmp_path / "small")
    make_tokenizer().save_pretrained(tmp_path / "small")
    pupil.grow(tmp_path / "small", tmp_path / "large", 96, 200, 5)
    large = AutoModelForCausalLM.from_pretrained(tmp_path / "large")
    assert large.num_parameters() > 10 * small.num_parameters()
    tokens = torch.randint(32, (4, 20))
    ours, wanted = (model(tokens).logits.log_softmax(-1) for model in (large, small))
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)


@pytest.mark.processes
def test_a_toy_step_is_measured() -> None:
    command = [sys.executable, str(BENCHMARKS / "end_to_end.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    figures, phases = tables(done.stdout)
    seconds, tokens = float(figures["s/step"]), float(figures["tokens/step"].replace(",", ""))
    assert figures["answers/step"] == "128"
    assert tokens == pytest.approx(128 * (LEAST_TOKENS + MOST_TOKENS) / 2, rel=0.3)
    assert 0 < float(figures["trained on"].replace(",", "")) <= tokens
    assert float(figures["tokens/s"].replace(",", "")) == pytest.approx(tokens / seconds, rel=0.02)
    assert float(figures["CPU s"]) > 0
    spent = [float(phases[name]) for name in ("rollout", "update", "weights", "between")]
    assert sum(spent) + float(phases["old_logp"]) == pytest.approx(seconds, rel=0.1, abs=0.05)
