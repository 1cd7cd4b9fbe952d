"""One name table per model family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpoints_conversion.families import llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from checkpoints_conversion.families.family import Family
from checkpoints_conversion.mapping import Mapping, Sizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FAMILIES = {
    "Qwen2ForCausalLM": qwen2.FAMILY,
    "Qwen3ForCausalLM": qwen3.FAMILY,
    "LlamaForCausalLM": llama.FAMILY,
    "MistralForCausalLM": mistral.FAMILY,
    "Qwen3MoeForCausalLM": qwen3_moe.FAMILY,
    "MixtralForCausalLM": mixtral.FAMILY,
}


def family_of(hf_config: PretrainedConfig) -> Family:
    """The family of this model.

    Raises:
        ValueError: the architecture has none.
    """
    architecture = (hf_config.architectures or ["none"])[0]
    if architecture not in FAMILIES:
        raise ValueError(
            f"no name table for {architecture}; supported architectures: {', '.join(FAMILIES)}"
        )
    return FAMILIES[architecture]


def mappings_for(hf_config: PretrainedConfig) -> tuple[Mapping, ...]:
    """The name table of this model."""
    return family_of(hf_config).mappings(hf_config)


def sizes_of(hf_config: PretrainedConfig) -> Sizes:
    """What the mappings need to know of this model."""
    options = family_of(hf_config).options(hf_config)
    head_dim = getattr(hf_config, "head_dim", None)
    return Sizes(
        num_layers=hf_config.num_hidden_layers,
        num_heads=hf_config.num_attention_heads,
        num_kv_heads=hf_config.num_key_value_heads,
        head_dim=head_dim or hf_config.hidden_size // hf_config.num_attention_heads,
        vocab=hf_config.vocab_size,
        hidden=hf_config.hidden_size,
        ffn=options.get("moe_ffn_hidden_size", hf_config.intermediate_size),
        num_experts=options.get("num_moe_experts", 0),
    )
