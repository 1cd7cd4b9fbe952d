"""Mistral: Llama's layer. Its first version slides a window over the attention: refused."""

from checkpoints_conversion.families.family import Family, attention, dense_mlp, sliding_window

FAMILY = Family(
    layer=lambda hf_config: (*attention(), *dense_mlp()),
    options=lambda hf_config: {},
    refusal=sliding_window,
)
