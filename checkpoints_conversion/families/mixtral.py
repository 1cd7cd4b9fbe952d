"""Mixtral: Mistral's attention and a mixture of experts in every layer."""

from checkpoints_conversion.families.family import (
    Family,
    attention,
    experts,
    moe_options,
    one_expert,
    sliding_window,
)

FAMILY = Family(
    layer=lambda hf_config: (*attention(), *experts("block_sparse_moe", "w1", "w3", "w2")),
    options=lambda hf_config: moe_options(
        hf_config.num_local_experts,
        hf_config.num_experts_per_tok,
        hf_config.intermediate_size,
        is_normalized=True,
    ),
    refusal=lambda hf_config: sliding_window(hf_config) or one_expert(hf_config),
)
