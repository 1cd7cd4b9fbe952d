"""What the families share: the record of one, and the rows that most name tables have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from checkpoints_conversion.mapping import QKV, GateUp, Mapping, Replicated, Row, Vocabulary

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LAYER, HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."
ATTENTION, HF_ATTENTION = LAYER + "self_attention.", HF_LAYER + "self_attn."


@dataclass(frozen=True)
class Family:
    """A model family, all that tells it from another.

    Args:
        layer: the name table of a layer, in the order in which weights are streamed.
        options: what its models set in Megatron-Core's TransformerConfig.
        refusal: why a variant of the family cannot be computed; None where it can.
    """

    layer: Callable[[PretrainedConfig], tuple[Mapping, ...]]
    options: Callable[[PretrainedConfig], dict[str, Any]]
    refusal: Callable[[PretrainedConfig], str | None]

    def mappings(self, hf_config: PretrainedConfig) -> tuple[Mapping, ...]:
        """The whole name table; a tied model has no head of its own."""
        head = () if hf_config.tie_word_embeddings else (HEAD,)
        return (EMBEDDING, *self.layer(hf_config), FINAL_NORM, *head)


EMBEDDING = Vocabulary(
    "embedding.word_embeddings.weight", ("model.embed_tokens.weight",), (("vocab", "hidden"),)
)
FINAL_NORM = Replicated("decoder.final_layernorm.weight", ("model.norm.weight",), (("hidden",),))
HEAD = Vocabulary("output_layer.weight", ("lm_head.weight",), (("vocab", "hidden"),))


def norm(megatron: str, hf: str, width: str = "hidden") -> Replicated:
    """A norm's weight in every layer."""
    return Replicated(f"{LAYER}{megatron}.weight", (f"{HF_LAYER}{hf}.weight",), ((width,),))


def attention(has_bias: bool = False, has_norms: bool = False) -> tuple[Mapping, ...]:
    """Norm, query, key and value (with biases), the heads' own norms, and the output."""
    hf = tuple(HF_ATTENTION + f"{which}_proj." for which in "qkv")
    widths = ("queries", "keys", "keys")
    weights = QKV(
        ATTENTION + "linear_qkv.weight",
        tuple(name + "weight" for name in hf),
        tuple((width, "hidden") for width in widths),
    )
    biases = QKV(
        ATTENTION + "linear_qkv.bias",
        tuple(name + "bias" for name in hf),
        tuple((width,) for width in widths),
    )
    head_norms = tuple(
        norm(f"self_attention.{which}_layernorm", f"self_attn.{which}_norm", "head_dim")
        for which in "qk"
    )
    return (
        norm("input_layernorm", "input_layernorm"),
        weights,
        *((biases,) if has_bias else ()),
        *(head_norms if has_norms else ()),
        Row(
            ATTENTION + "linear_proj.weight",
            (HF_ATTENTION + "o_proj.weight",),
            (("hidden", "queries"),),
        ),
        norm("pre_mlp_layernorm", "post_attention_layernorm"),
    )


def mlp(megatron: str, hf: str, gate: str, up: str, down: str) -> tuple[Mapping, ...]:
    """A gated MLP: a layer's own, or each expert's."""
    return (
        GateUp(
            f"{LAYER}{megatron}.linear_fc1.weight",
            (f"{HF_LAYER}{hf}.{gate}.weight", f"{HF_LAYER}{hf}.{up}.weight"),
            (("ffn", "hidden"), ("ffn", "hidden")),
        ),
        Row(
            f"{LAYER}{megatron}.linear_fc2.weight",
            (f"{HF_LAYER}{hf}.{down}.weight",),
            (("hidden", "ffn"),),
        ),
    )


def dense_mlp() -> tuple[Mapping, ...]:
    """The MLP of a dense layer."""
    return mlp("mlp", "mlp", "gate_proj", "up_proj", "down_proj")


def experts(hf: str, gate: str, up: str, down: str) -> tuple[Mapping, ...]:
    """Router and experts; `hf` is the module that has them both."""
    router = Replicated(
        LAYER + "mlp.router.weight",
        (f"{HF_LAYER}{hf}.gate.weight",),
        (("num_experts", "hidden"),),
    )
    return (router, *mlp("mlp.experts.{expert}", hf + ".experts.{expert}", gate, up, down))


def moe_options(num_experts: int, num_chosen: int, ffn: int, is_normalized: bool) -> dict[str, Any]:
    """Megatron's settings of a mixture of experts as transformers computes it.

    A softmax over the chosen experts' logits equals one over all, chosen from and then normalized.
    """
    return {
        "num_moe_experts": num_experts,
        "moe_router_topk": num_chosen,
        "moe_ffn_hidden_size": ffn,
        "moe_router_pre_softmax": not is_normalized,
        "moe_router_load_balancing_type": "none",  # no loss but the recipe's objective
        "moe_aux_loss_coeff": 0.0,
    }


def one_expert(hf_config: PretrainedConfig) -> str | None:
    """A refusal where each token has one expert, whose normalized weight is always 1."""
    is_one = hf_config.num_experts_per_tok == 1 and getattr(hf_config, "norm_topk_prob", True)
    return "one expert a token with normalized weights" if is_one else None


def sliding_window(hf_config: PretrainedConfig) -> str | None:
    """A refusal where attention does not see the whole sequence."""
    is_on = getattr(hf_config, "use_sliding_window", True)
    window = getattr(hf_config, "sliding_window", None)
    if not is_on or window is None or window >= hf_config.max_position_embeddings:
        return None
    return f"sliding-window attention (sliding_window={window})"


def biases(hf_config: PretrainedConfig, *keys: str) -> str | None:
    """A refusal where a projection has a bias that the table does not name."""
    return next((f"{key}=true" for key in keys if getattr(hf_config, key, False)), None)
