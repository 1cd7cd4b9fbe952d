"""Qwen2.5's shapes, random weights and random sequences: what benchmarks run that need no model."""

import os
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch

from megatron_nft.config import ParallelConfig
from megatron_nft.policy import packing, parallel
from megatron_nft.policy.balance import deal

FIELDS = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
FIELDS += ["num_key_value_heads", "vocab_size", "tie_word_embeddings"]
SHAPES = {
    "toy": (128, 256, 2, 4, 2, 512, False),
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
    "32B": (5120, 27_648, 64, 40, 8, 152_064, False),
}
SEED, SIGMA = 0, 0.8  # SIGMA of the logarithm of the lengths


def start(layout: ParallelConfig) -> None:
    """Join torchrun's processes, or be the only one."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update({key: value for key, value in alone.items() if key not in os.environ})
    parallel.initialize(layout, SEED)


def hf_config(model: str) -> SimpleNamespace:
    """What the policy reads of a Hugging Face configuration."""
    return SimpleNamespace(
        architectures=["Qwen2ForCausalLM"],
        rms_norm_eps=1e-6,
        max_position_embeddings=32_768,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        **dict(zip(FIELDS, SHAPES[model], strict=True)),
    )


@torch.no_grad()
def fill(chunks: Sequence[torch.nn.Module]) -> None:
    for name, weight in (pair for chunk in chunks for pair in chunk.named_parameters()):
        weight.normal_(std=0.02) if weight.dim() > 1 else weight.fill_("norm" in name)


def workload(
    vocab_size: int, most: int, mean: float, num_ranks: int, num_micro_batches: int
) -> list[packing.Sequence]:
    """As many random sequences as fit into every rank's micro-batches, a tenth of each a prompt.

    Their lengths are log-normal, with this mean before they are cut at `most`, which is also a
    micro-batch's budget.
    """
    random = np.random.default_rng(SEED)
    sequences: list[packing.Sequence] = []
    while True:
        drawn = random.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA)
        length = int(np.clip(drawn, 2, most))  # one more token is only predicted
        tokens = random.integers(0, vocab_size, length + 1).astype(np.int32)
        prompt, response = np.split(tokens, [max(1, length // 10)])
        logp, correct = np.zeros(len(response), np.float32), random.random() < 0.5
        more = [*sequences, packing.Sequence(prompt, response, logp, logp, correct, 0.5)]
        if len(deal([s.num_tokens for s in more], num_ranks, most)[0]) > num_micro_batches:
            return sequences
        sequences = more
