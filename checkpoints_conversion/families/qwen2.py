"""Qwen2 and Qwen2.5: query, key and value have biases; small sizes tie head and embedding."""

from checkpoints_conversion.families.family import Family, attention, dense_mlp, sliding_window

FAMILY = Family(
    layer=lambda hf_config: (*attention(has_bias=True), *dense_mlp()),
    options=lambda hf_config: {"add_qkv_bias": True},
    refusal=sliding_window,
)
