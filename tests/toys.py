"""Small real models and sequences for the tests."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_nft.policy.packing import Sequence

VOCAB_SIZE = 67


SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SIZES_OF = {  # by model type, where it has sizes of its own
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 24},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
LLAMA3_ROPE = {  # frequencies of all three kinds: kept, scaled and between the two
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def save_qwen2(path: Path, *, seed: int = 0, tied: bool = False, **changes: int) -> Path:
    """A random Qwen2 with biases and norms that are not their initial constants."""
    return save_model(path, "qwen2", seed=seed, tied=tied, **changes)


def save_model(
    path: Path, model_type: str, *, seed: int = 0, tied: bool = False, **changes: Any
) -> Path:
    """A random model with biases and norms that are not their initial constants."""
    torch.manual_seed(seed)
    options = SIZES | SIZES_OF.get(model_type, {}) | changes
    config = AutoConfig.for_model(model_type, **options, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


def random_sequences(num: int, *, seed: int = 0, longest: int = 20) -> list[Sequence]:
    """Sequences of unequal length with old log-probabilities near those of a random model."""
    rng = np.random.default_rng(seed)
    sequences = []
    for _ in range(num):
        prompt = rng.integers(0, VOCAB_SIZE, rng.integers(1, longest)).astype(np.int32)
        response = rng.integers(0, VOCAB_SIZE, rng.integers(1, longest)).astype(np.int32)
        old_logp = -rng.uniform(3.0, 5.5, len(response)).astype(np.float32)
        sequences.append(
            Sequence(
                prompt=prompt,
                response=response,
                logp=old_logp,
                old_logp=old_logp,
                correct=bool(rng.integers(0, 2)),
                group_accuracy=float(rng.integers(1, 16)) / 16,
            )
        )
    return sequences


def weighted(sequences: list[Sequence], seed: int = 0) -> list[Sequence]:
    """The sequences with a weight of its own on every token."""
    rng = np.random.default_rng(seed)
    weights = [rng.uniform(0, 2, len(s.response)).astype(np.float32) for s in sequences]
    return [replace(s, importance=w) for s, w in zip(sequences, weights, strict=True)]


def save_tokenizer(path: Path) -> Path:
    """A real tokenizer of one-letter words: token i is the i-th character from `0` on."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(chr(ord("0") + i) for i in range(VOCAB_SIZE - 2))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<pad>"
    )
    fast.save_pretrained(path)
    return path


def train_tokenizer(path: Path, texts: list[str]) -> Any:
    """A byte-level BPE of the texts and a random Qwen2 with its vocabulary, saved together."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "\\boxed{"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    save_qwen2(path, vocab_size=len(fast), hidden_size=128, max_position_embeddings=1024)
    fast.save_pretrained(path)
    return fast
