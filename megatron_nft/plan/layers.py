"""Seconds of a layer and of the head for a micro-batch on one GPU: a roofline by their parts.

Matrix products and attention by operations, norms, rotations and activations by the bytes that they
cannot avoid, exchanges between ranks by bytes too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoints_conversion.families import sizes_of
from megatron_nft.config import Config
from megatron_nft.plan import cards
from megatron_nft.plan.cards import Card
from megatron_nft.policy.flops import layer_matmul_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GPUS_A_NODE = 8
FLOAT32_RATE = 50e12  # of 67 by the data sheet of H100 and H200


def kind_of(config: Config) -> str:
    """Of the layers, on a machine that has Transformer Engine."""
    return "torch" if config.model.layers == "torch" else "transformer_engine"


def bytes_of(config: Config) -> int:
    return 4 if config.model.dtype == "float32" else 2


@dataclass(frozen=True)
class Pass:
    """Seconds of one layer."""

    products: float
    attention: float
    passes: float  # over memory, between the products
    exchanged: float
    mlp: float  # of all of these, what recomputing the MLP alone does again

    @property
    def total(self) -> float:
        return self.products + self.attention + self.passes + self.exchanged


@dataclass(frozen=True)
class LayerTime:
    """Seconds of a layer for one micro-batch; what is computed again is in backward."""

    forward: float
    backward: float


def layer_time(
    hf_config: PretrainedConfig, config: Config, card: Card, rows: float, attended: float
) -> LayerTime:
    """Of `rows` tokens of this context-parallel rank, in sequences of `attended` tokens."""
    least = cards.LAUNCHES[kind_of(config)]
    forward, backward = _forward(hf_config, config, card, rows, attended), 0.0
    again = {"none": 0.0, "full": forward.total}.get(config.memory.recompute)
    if again is None:  # selective
        modules = config.memory.recompute_modules
        again = forward.mlp * bool({"mlp", "moe"} & set(modules))
        again += forward.attention * ("core_attn" in modules)
    backward = _backward(hf_config, config, card, rows, forward)
    return LayerTime(max(forward.total, least), max(backward + again, least))


def _forward(
    hf_config: PretrainedConfig, config: Config, card: Card, rows: float, attended: float
) -> Pass:
    sizes, tensor, size = sizes_of(hf_config), config.parallel.tensor, bytes_of(config)
    chosen = hf_config.num_experts_per_tok if sizes.num_experts else 1
    mlp_weights = 3 * sizes.hidden * sizes.ffn * chosen
    others = layer_matmul_parameters(hf_config) - mlp_weights
    # a mixture's experts have few rows each
    mlp_rows = rows * chosen / max(1, sizes.num_experts / config.parallel.expert)
    products_mlp = 2 * mlp_weights * rows / tensor / _rate(config, card, mlp_rows)
    products = products_mlp + 2 * others * rows / tensor / _rate(config, card, rows)
    scores = 2 * attended * sizes.queries * rows / tensor
    shared = tensor if config.parallel.sequence else 1
    bandwidth = cards.PASSES[kind_of(config)] * card.bandwidth
    turned = 2 * (sizes.queries + sizes.keys) / tensor
    gated = 3 * sizes.ffn * chosen / tensor
    moved = 10 * sizes.hidden / shared + turned + gated
    exchanged = _exchanged(hf_config, config, card, rows, is_backward=False)
    return Pass(
        products=products,
        attention=scores / card.attention[kind_of(config)],
        passes=size * rows * moved / bandwidth,
        exchanged=exchanged,
        mlp=products_mlp + size * rows * gated / bandwidth + exchanged / 2,
    )


def _backward(
    hf_config: PretrainedConfig, config: Config, card: Card, rows: float, forward: Pass
) -> float:
    """Twice forward's operations; 12, 2 and 5 passes for its 10, 2 and 3."""
    sizes, tensor, size = sizes_of(hf_config), config.parallel.tensor, bytes_of(config)
    chosen = hf_config.num_experts_per_tok if sizes.num_experts else 1
    shared = tensor if config.parallel.sequence else 1
    more = 2 * sizes.hidden / shared + 2 * sizes.ffn * chosen / tensor
    passes = forward.passes + size * rows * more / (cards.PASSES[kind_of(config)] * card.bandwidth)
    exchanged = _exchanged(hf_config, config, card, rows, is_backward=True)
    return 2 * (forward.products + forward.attention) + passes + exchanged


def _rate(config: Config, card: Card, rows: float) -> float:
    """Operations a second of products with so many rows."""
    whole = card.bf16 if config.fp8.format == "off" else card.fp8[config.fp8.recipe]
    if config.model.dtype == "float32":
        whole = FLOAT32_RATE
    return whole * rows / (rows + cards.HALF_RATE_ROWS)


def exchanged_bytes(
    hf_config: PretrainedConfig, config: Config, rows: float, *, is_backward: bool
) -> dict[str, float]:
    """Bytes that a GPU sends for a layer and micro-batch, by the ranks among which it does.

    Sequence parallelism gathers and scatters each row twice in a pass, and gathers twice more in
    backward; two all-reduces without it are as much as the former. Keys and values go to all
    context-parallel ranks, and their gradients back, in TE's ring with the keys and values once
    more; tokens go to the experts and back.
    """
    sizes, parallel, size = sizes_of(hf_config), config.parallel, bytes_of(config)
    tensor, found = parallel.tensor, {}
    if tensor > 1:
        times = 6 if is_backward and parallel.sequence else 4
        found["tensor"] = times * size * rows * sizes.hidden * (tensor - 1) / tensor
    if parallel.context > 1:
        keys = 2 * size * rows * sizes.keys / tensor * (parallel.context - 1)
        is_ring = kind_of(config) == "transformer_engine"
        found["context"] = keys * (2 if is_backward and is_ring else 1)
    if sizes.num_experts and parallel.expert > 1:
        shared = rows / (tensor if parallel.sequence else 1)
        away = (parallel.expert - 1) / parallel.expert
        chosen = hf_config.num_experts_per_tok
        found["expert"] = 2 * size * shared * chosen * sizes.hidden * away
    return found


def link(config: Config, card: Card, kind: str) -> float:
    """Bytes a second among the ranks of a kind; tensor ranks are next to each other."""
    parallel = config.parallel
    reach = {
        "tensor": parallel.tensor,
        "context": parallel.tensor * parallel.context,
        "expert": parallel.expert,
    }
    return card.nvlink if reach[kind] <= GPUS_A_NODE else card.network


def _exchanged(
    hf_config: PretrainedConfig, config: Config, card: Card, rows: float, *, is_backward: bool
) -> float:
    """Seconds that nothing hides.

    In backward Megatron's column-parallel products gather and reduce beside products, which leaves
    the two gathers of sequence parallelism; TE's context parallelism hides behind the attention.
    """
    sent = exchanged_bytes(hf_config, config, rows, is_backward=is_backward)
    if is_backward and "tensor" in sent:
        sent["tensor"] *= 2 / 6 if config.parallel.sequence else 0
    if kind_of(config) == "transformer_engine":
        sent.pop("context", None)
    return sum(number / link(config, card, kind) for kind, number in sent.items())


def head_time(
    hf_config: PretrainedConfig,
    config: Config,
    card: Card,
    rows: float,
    *,
    num_products: int,
) -> float:
    """Of `rows` predicted tokens: one product for log-probabilities, three with the gradients."""
    weights = hf_config.hidden_size * hf_config.vocab_size / config.parallel.tensor
    rate = FLOAT32_RATE if config.model.dtype == "float32" else card.bf16
    return num_products * 2 * weights * rows / rate
