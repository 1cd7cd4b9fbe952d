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
from megatron_nft.plan.shape import bytes_of, kind_of, link, rate, sequence_ranks
from megatron_nft.policy.flops import layer_matmul_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Pass:
    """Seconds of one layer."""

    mlp: float  # its products; the router is not among them
    others: float  # products
    attention: float
    gated: float  # of the MLP, over memory
    passes: float  # over memory besides
    exchanged: dict[str, float]  # by the ranks among which, where nothing hides it

    @property
    def products(self) -> float:
        return self.mlp + self.others

    @property
    def total(self) -> float:
        over_memory = self.gated + self.passes
        return self.products + self.attention + over_memory + sum(self.exchanged.values())


@dataclass(frozen=True)
class LayerTime:
    """Seconds of a layer for one micro-batch; what is computed again is in backward."""

    forward: float
    backward: float


def layer_time(
    hf_config: PretrainedConfig, config: Config, card: Card, rows: float, attended: float
) -> LayerTime:
    """Of `rows` tokens of this context-parallel rank, in sequences of `attended` tokens."""
    least, is_full = cards.LAUNCHES[kind_of(config)], config.memory.recompute == "full"
    forward = forward_pass(hf_config, config, card, rows, attended)
    backward = _backward(hf_config, config, card, rows, forward) + _again(config, forward)
    return LayerTime(
        forward=max(forward.total, least), backward=max(backward, least * (2 if is_full else 1))
    )


def recomputes(config: Config, module: str) -> bool:
    memory = config.memory
    return memory.recompute == "selective" and module in memory.recompute_modules


def exchanged_again(config: Config) -> dict[str, float]:
    """How often backward does forward's exchanges again, by ranks: half of tensor's are the MLP's.

    The core attention has the gathering of keys and values in it, a mixture's MLP all of the
    experts'.
    """
    if config.memory.recompute == "full":
        return dict.fromkeys(("tensor", "context", "expert"), 1.0)
    mlp, attention = (float(recomputes(config, name)) for name in ("mlp", "core_attn"))
    return {"tensor": mlp / 2, "context": attention, "expert": mlp}


def _again(config: Config, forward: Pass) -> float:
    """Seconds of what backward computes again."""
    if config.memory.recompute == "full":
        return forward.total
    again = exchanged_again(config)
    found = sum(again[kind] * seconds for kind, seconds in forward.exchanged.items())
    found += (forward.mlp + forward.gated) * recomputes(config, "mlp")
    return found + forward.attention * recomputes(config, "core_attn")


def forward_pass(
    hf_config: PretrainedConfig, config: Config, card: Card, rows: float, attended: float
) -> Pass:
    sizes, tensor, shared = sizes_of(hf_config), config.parallel.tensor, sequence_ranks(config)
    chosen = hf_config.num_experts_per_tok if sizes.num_experts else 1
    mlp_weights = 3 * sizes.hidden * sizes.ffn * chosen
    others = layer_matmul_parameters(hf_config) - mlp_weights
    mlp_rows = rows
    if sizes.num_experts:  # each of them has few
        mlp_rows = rows / shared * chosen * config.parallel.expert / sizes.num_experts
    one_byte = bytes_of(config) / (cards.PASSES[kind_of(config)] * card.bandwidth)
    moved = 10 * sizes.hidden / shared + 2 * (sizes.queries + sizes.keys) / tensor
    return Pass(
        mlp=2 * mlp_weights * rows / tensor / _rate(config, card, mlp_rows),
        others=2 * others * rows / tensor / _rate(config, card, rows),
        attention=2 * attended * sizes.queries * rows / tensor / card.attention[kind_of(config)],
        gated=one_byte * rows * 3 * sizes.ffn * chosen / tensor,
        passes=one_byte * rows * moved,
        exchanged=_exchanged(hf_config, config, card, rows, is_backward=False),
    )


def _backward(
    hf_config: PretrainedConfig, config: Config, card: Card, rows: float, forward: Pass
) -> float:
    """Twice forward's operations; 12, 2 and 5 passes for its 10, 2 and 3."""
    sizes, shared = sizes_of(hf_config), sequence_ranks(config)
    one_byte = bytes_of(config) / (cards.PASSES[kind_of(config)] * card.bandwidth)
    passes = forward.passes + one_byte * rows * 2 * sizes.hidden / shared
    passes += forward.gated * 5 / 3
    exchanged = _exchanged(hf_config, config, card, rows, is_backward=True)
    return 2 * (forward.products + forward.attention) + passes + sum(exchanged.values())


def _rate(config: Config, card: Card, rows: float) -> float:
    """Operations a second of a layer's products with so many rows."""
    is_fp8 = config.fp8.format != "off"
    whole = card.fp8[config.fp8.recipe] if is_fp8 else rate(config, card)
    return whole * rows / (rows + cards.HALF_RATE_ROWS)


def exchanged_bytes(
    hf_config: PretrainedConfig, config: Config, rows: float, *, is_backward: bool
) -> dict[str, float]:
    """Bytes that a GPU sends for a layer and micro-batch, by the ranks among which it does.

    Sequence parallelism gathers and scatters each row twice in a pass, and gathers twice more in
    backward; two all-reduces without it are as much as the former. Keys and values go to all
    context-parallel ranks, and their gradients back, in TE's ring with the keys and values once
    more; tokens go to the experts and back, here to all of them alike.
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
        away = (parallel.expert - 1) / parallel.expert
        chosen = hf_config.num_experts_per_tok * sizes.hidden
        found["expert"] = 2 * size * rows / sequence_ranks(config) * chosen * away
    return found


def _exchanged(
    hf_config: PretrainedConfig, config: Config, card: Card, rows: float, *, is_backward: bool
) -> dict[str, float]:
    """Seconds that nothing hides, by ranks.

    In backward Megatron's column-parallel products gather and reduce beside products, which leaves
    the two gathers of sequence parallelism; TE's context parallelism hides behind the attention.
    """
    sent = exchanged_bytes(hf_config, config, rows, is_backward=is_backward)
    if is_backward and "tensor" in sent:
        sent["tensor"] *= 2 / 6 if config.parallel.sequence else 0
    if kind_of(config) == "transformer_engine":
        sent.pop("context", None)
    # how many GPUs there are in all makes no difference to these
    return {kind: number / link(config, card, kind, 0) for kind, number in sent.items()}


def head_time(
    hf_config: PretrainedConfig, config: Config, card: Card, rows: float, num_products: int
) -> float:
    """Of `rows` predicted tokens; a product gives log-probabilities, two more the gradients."""
    weights = hf_config.hidden_size * hf_config.vocab_size / config.parallel.tensor
    return num_products * 2 * weights * rows / rate(config, card)
