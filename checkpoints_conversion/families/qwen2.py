"""Qwen2 and Qwen2.5: query, key and value have biases; small sizes tie head and embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpoints_conversion.mapping import QKV, GateUp, Mapping, Replicated, Row, Vocabulary

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LAYER, HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."


def mappings(hf_config: PretrainedConfig) -> tuple[Mapping, ...]:
    """The name table, in the order in which weights are streamed."""
    head = () if hf_config.tie_word_embeddings else (HEAD,)
    return (EMBEDDING, *LAYERS, FINAL_NORM, *head)


EMBEDDING = Vocabulary("embedding.word_embeddings.weight", ("model.embed_tokens.weight",))
FINAL_NORM = Replicated("decoder.final_layernorm.weight", ("model.norm.weight",))
HEAD = Vocabulary("output_layer.weight", ("lm_head.weight",))


def _qkv(kind: str) -> QKV:
    names = tuple(HF_LAYER + f"self_attn.{which}_proj.{kind}" for which in "qkv")
    return QKV(LAYER + f"self_attention.linear_qkv.{kind}", names)


LAYERS = (
    Replicated(LAYER + "input_layernorm.weight", (HF_LAYER + "input_layernorm.weight",)),
    _qkv("weight"),
    _qkv("bias"),
    Row(LAYER + "self_attention.linear_proj.weight", (HF_LAYER + "self_attn.o_proj.weight",)),
    Replicated(LAYER + "pre_mlp_layernorm.weight", (HF_LAYER + "post_attention_layernorm.weight",)),
    GateUp(
        LAYER + "mlp.linear_fc1.weight",
        (HF_LAYER + "mlp.gate_proj.weight", HF_LAYER + "mlp.up_proj.weight"),
    ),
    Row(LAYER + "mlp.linear_fc2.weight", (HF_LAYER + "mlp.down_proj.weight",)),
)
