"""Llama 2, 3, 3.1 and later text models: no biases; from 3.1 on the rope is scaled."""

from checkpoints_conversion.families.family import Family, attention, biases, dense_mlp

FAMILY = Family(
    layer=lambda hf_config: (*attention(), *dense_mlp()),
    options=lambda hf_config: {},
    refusal=lambda hf_config: biases(hf_config, "attention_bias", "mlp_bias"),
)
