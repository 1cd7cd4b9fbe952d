"""Qwen3: every head's queries and keys are normalized; no biases."""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpoints_conversion.families.family import (
    Family,
    attention,
    biases,
    dense_mlp,
    sliding_window,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _refusal(hf_config: PretrainedConfig) -> str | None:
    return sliding_window(hf_config) or biases(hf_config, "attention_bias")


FAMILY = Family(
    layer=lambda hf_config: (*attention(has_norms=True), *dense_mlp()),
    options=lambda hf_config: {"qk_layernorm": True},
    refusal=_refusal,
)
