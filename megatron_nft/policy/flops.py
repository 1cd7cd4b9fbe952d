"""Floating-point operations of a model, from its Hugging Face configuration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from checkpoints_conversion.families import sizes_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def layer_matmul_parameters(hf_config: PretrainedConfig) -> int:
    """Weights of one layer that a token is multiplied by: of the experts those that it chooses."""
    sizes = sizes_of(hf_config)
    heads = 2 * sizes.queries + 2 * sizes.keys
    num_mlps = hf_config.num_experts_per_tok if sizes.num_experts else 1
    return sizes.hidden * (heads + num_mlps * 3 * sizes.ffn + sizes.num_experts)


def matmul_parameters(hf_config: PretrainedConfig) -> int:
    """Weights that a token is multiplied by: the layers and the head, not the embedding."""
    layers = hf_config.num_hidden_layers * layer_matmul_parameters(hf_config)
    return layers + hf_config.hidden_size * hf_config.vocab_size


def attention_share(hf_config: PretrainedConfig) -> float:
    """Attention's work relative to the matmuls', per token of a sequence's length.

    Of a sequence of n tokens every token costs 2·P in the matmuls with P weights, and on average
    2·n·L·H·D in the causal attention of L layers with H heads of size D: half of 4·n·H·D each.
    """
    sizes = sizes_of(hf_config)
    per_length = sizes.num_layers * sizes.queries
    return per_length / matmul_parameters(hf_config)


def forward_flops(
    hf_config: PretrainedConfig, lengths: Iterable[int], num_predicted: int | None = None
) -> float:
    """Of one forward pass over sequences of these lengths; a backward pass is twice as much.

    Args:
        num_predicted: tokens that go through the head, where they are not all.
    """
    lengths = list(lengths)
    num_tokens = sum(lengths)
    share = attention_share(hf_config)
    whole = 2 * matmul_parameters(hf_config) * sum(n + share * n * n for n in lengths)
    skipped = 0 if num_predicted is None else num_tokens - num_predicted
    return whole - 2 * hf_config.hidden_size * hf_config.vocab_size * skipped
