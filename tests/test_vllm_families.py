"""vLLM loads what conversion writes, and takes the live stream, for every family."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run
from toys import LLAMA3_ROPE, VOCAB_SIZE, save_model, save_tokenizer
from transformers import AutoModelForCausalLM

from checkpoints_conversion.convert import hf_to_megatron, megatron_to_hf
from megatron_nft.config import Config, ModelConfig, RolloutConfig
from megatron_nft.rollout.groups import Problem

VARIANTS = {
    "qwen2": {"tied": True},
    "qwen3": {"head_dim": 32, "tied": True},
    "llama": {"rope_parameters": LLAMA3_ROPE},
    "mistral": {},
    "qwen3_moe": {"head_dim": 32, "norm_topk_prob": True, "moe_intermediate_size": 64},
    "mixtral": {},  # experts of width 48, which vLLM's CPU build pads
}
Answers = list[tuple[np.ndarray, np.ndarray, np.ndarray]]  # prompt, response, log-probabilities


def _sample(path: Path, changed: Path) -> list[Answers]:
    """From the directory as vLLM loads it, and after taking another one's weights as a stream."""
    from transformers import AutoTokenizer

    from checkpoints_conversion import hf_to_megatron
    from checkpoints_conversion.hf_files import read_hf_config
    from checkpoints_conversion.stream import stream
    from megatron_nft.policy import parallel
    from megatron_nft.policy.architecture import build_model, transformer_config
    from megatron_nft.rollout.colocated import ColocatedEngine

    options = RolloutConfig(max_response_tokens=12, max_sequences=32)
    config = Config(model=ModelConfig(path=str(path), dtype="float32"), rollout=options)
    parallel.initialize(config.parallel, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    engine = ColocatedEngine(path, tokenizer, options, "float32", max_tokens=64, seed=0)
    found = [_answers(engine)]
    hf_config = read_hf_config(changed)
    chunks = build_model(hf_config, transformer_config(hf_config, config))
    hf_to_megatron.load(chunks, changed, hf_config)
    engine.load_weights(stream(chunks, hf_config), 1)
    return [*found, _answers(engine)]


def _answers(engine: object) -> Answers:
    from megatron_nft.rollout.colocated import Sampling

    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, VOCAB_SIZE, 3 + i).astype(np.int32) for i in range(4)]
    problems = [Problem(str(i), prompt, "1", "toy") for i, prompt in enumerate(prompts)]
    sampling = Sampling(3, 1.0, 1.0, 12, seed=0)
    answered = engine.generate(problems, [1.0] * len(problems), sampling)
    return [(prompts[i], r.tokens, r.logp) for i, rs in answered for r in rs]


@torch.no_grad()
def _worst(path: Path, answers: Answers) -> float:
    """The largest |Δlogp| to transformers' model."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    worst = 0.0
    for prompt, response, logp in answers:
        tokens = torch.from_numpy(np.concatenate((prompt, response)).astype(np.int64))
        logits = model(tokens[None]).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, tokens[len(prompt) :, None])[:, 0]
        worst = max(worst, float((expected - torch.from_numpy(logp)).abs().max()))
    return worst


@pytest.mark.processes
@pytest.mark.parametrize("family", VARIANTS)
def test_log_probabilities_are_transformers(tmp_path: Path, family: str) -> None:
    save = partial(save_model, model_type=family, hidden_size=128, **VARIANTS[family])
    source = save_tokenizer(save(tmp_path / "source"))  # vLLM on a CPU: heads of 32
    changed = save(tmp_path / "changed", seed=1)
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "export")
    [(loaded, streamed)] = run(_sample, 1, tmp_path / "export", changed)
    assert _worst(source, loaded) <= 1e-4
    assert _worst(changed, streamed) <= 1e-4
    assert _worst(source, streamed) > 1e-2  # the weights did change
