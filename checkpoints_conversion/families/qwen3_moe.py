"""Qwen3 with a mixture of experts in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from checkpoints_conversion.families.family import (
    Family,
    attention,
    biases,
    experts,
    moe_options,
    one_expert,
    sliding_window,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _options(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        "qk_layernorm": True,
        **moe_options(
            hf_config.num_experts,
            hf_config.num_experts_per_tok,
            hf_config.moe_intermediate_size,
            is_normalized=hf_config.norm_topk_prob,
        ),
    }


def _refusal(hf_config: PretrainedConfig) -> str | None:
    if hf_config.mlp_only_layers or hf_config.decoder_sparse_step != 1:
        return "layers without experts (mlp_only_layers or decoder_sparse_step)"
    biased = biases(hf_config, "attention_bias")
    return sliding_window(hf_config) or biased or one_expert(hf_config)


FAMILY = Family(
    layer=lambda hf_config: (
        *attention(has_norms=True),
        *experts("mlp", "gate_proj", "up_proj", "down_proj"),
    ),
    options=_options,
    refusal=_refusal,
)
