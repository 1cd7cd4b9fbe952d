"""Bytes that GPUs send for gradients, weights and between stages, and how long that takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoints_conversion.families import sizes_of
from megatron_nft.config import Config
from megatron_nft.plan import cards
from megatron_nft.plan.cards import Card
from megatron_nft.plan.layers import exchanged_again, exchanged_bytes
from megatron_nft.plan.memory import GRADIENT_BYTES, num_parameters
from megatron_nft.plan.sampling import num_engines
from megatron_nft.plan.shape import (
    GPUS_A_NODE,
    bytes_of,
    is_within_node,
    link,
    samples,
    sequence_ranks,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PretrainedConfig

    from megatron_nft.plan.parameters import Held


@dataclass(frozen=True)
class Traffic:
    """Bytes that a GPU sends for one purpose, and the seconds that it waits for that."""

    what: str
    num_ranks: int
    sent: float
    is_nvlink: bool
    seconds: float = 0.0


def reduction(config: Config, card: Card, num_gpus: int, held: Sequence[Held]) -> Traffic:
    """Of one update's gradients and new weights.

    Float32 gradients are scattered and weights gathered; without the distributed optimizer
    gradients are gathered instead. Nothing of it overlaps with backward (policy/optimizer.py).
    Ranks with the same weights on one node share the way to the next out among their network cards.
    """
    parallel = config.parallel
    num_ranks = num_gpus // (parallel.tensor * parallel.pipeline)
    gathered = bytes_of(config) if parallel.distributed_optimizer else GRADIENT_BYTES
    is_nvlink = is_within_node(config, "data", num_gpus)
    most = max(one.dense for one in held), max(one.expert for one in held)
    sharing = num_ranks, max(1, num_ranks * parallel.tensor // parallel.expert)
    sent = seconds = 0.0
    for number, ranks in zip(most, sharing, strict=True):
        part = number * (GRADIENT_BYTES + gathered) * (ranks - 1) / ranks
        on_a_node = max(1, GPUS_A_NODE * ranks // (num_gpus // parallel.pipeline))
        rate = card.nvlink if is_nvlink else min(card.nvlink, card.network * on_a_node)
        sent, seconds = sent + part, seconds + part / rate
    return Traffic("gradients and weights", num_ranks, sent, is_nvlink, seconds)


def handed_on(hf_config: PretrainedConfig, config: Config, rows: float) -> float:
    """Bytes of a micro-batch from one stage to the next, all of a rank's chunks."""
    each = bytes_of(config) * rows * hf_config.hidden_size / sequence_ranks(config)
    return each * config.parallel.virtual_pipeline if config.parallel.pipeline > 1 else 0.0


def weights(hf_config: PretrainedConfig, config: Config, card: Card, num_gpus: int) -> Traffic:
    """Of one hand-over to the engines."""
    size = bytes_of(config) * num_parameters(hf_config)
    if config.rollout.engine == "remote":
        return _to_servers(config, card, num_gpus, size)
    return _in_place(config, card, num_gpus, size)


def _in_place(config: Config, card: Card, num_gpus: int, size: float) -> Traffic:
    """Every rank gets every tensor whole, checks it by digests (two passes) and keeps its part."""
    parallel = config.parallel
    held_by = parallel.pipeline * math.lcm(parallel.tensor, parallel.expert)
    kinds = ["tensor", "expert", *(["stages"] if parallel.pipeline > 1 else [])]
    is_nvlink = all(is_within_node(config, kind, num_gpus) for kind in kinds)
    sent = size * (held_by - 1) / held_by
    seconds = sent / (card.nvlink if is_nvlink else card.network)
    seconds += 3 * size / (cards.DECODING * card.bandwidth)
    return Traffic("weights to the engines", held_by, sent, is_nvlink, seconds)


def _to_servers(config: Config, card: Card, num_gpus: int, size: float) -> Traffic:
    """By the first process: to each server in turn, or through files that all read at once."""
    number = num_engines(config, num_gpus)
    way = config.rollout.weight_transfer
    if way == "files":
        return Traffic("weights by files", 1, 0.0, False, 2 * size / cards.FILES)
    rate = cards.GLOO if way == "gloo" else card.network
    return Traffic("weights to the servers, GPU 0", 1, number * size, False, number * size / rate)


def of_layers(
    hf_config: PretrainedConfig,
    config: Config,
    num_gpus: int,
    before: tuple[float, float],
    updates: tuple[float, float],
) -> list[Traffic]:
    """What the ranks of a layer, and neighbouring stages, exchange in a rollout's passes.

    Args:
        before, updates: micro-batches and rows of each, in the passes before training and in it.
    """
    parallel = config.parallel
    ranks = {"tensor": parallel.tensor, "context": parallel.context, "expert": parallel.expert}
    layers = sizes_of(hf_config).num_layers / parallel.pipeline
    again, sent = exchanged_again(config), dict[str, float]()
    for (number, rows), is_training in ((before, False), (updates, True)):
        forward = exchanged_bytes(hf_config, config, rows, is_backward=False)
        backward = exchanged_bytes(hf_config, config, rows, is_backward=True)
        for kind in forward:
            more = again[kind] * forward[kind] + backward[kind] if is_training else 0
            sent[kind] = sent.get(kind, 0.0) + number * layers * (forward[kind] + more)
    found = [
        Traffic(f"layers, {kind} ranks", ranks[kind], size, is_within_node(config, kind, num_gpus))
        for kind, size in sent.items()
    ]
    if parallel.pipeline > 1:
        size = before[0] * handed_on(hf_config, config, before[1])
        size += 2 * updates[0] * handed_on(hf_config, config, updates[1])
        is_nvlink = is_within_node(config, "stages", num_gpus)
        found.append(Traffic("between stages", parallel.pipeline, size, is_nvlink))
    return found


def between_stages(
    hf_config: PretrainedConfig, config: Config, card: Card, num_gpus: int, rows: float
) -> float:
    """Seconds of handing a micro-batch on; nothing hides it."""
    return handed_on(hf_config, config, rows) / link(config, card, "stages", num_gpus)


def offloading(config: Config, card: Card, most: float) -> float:
    """Seconds of moving the optimizer's bytes off the GPU and back; gradients are made anew."""
    is_lent = config.memory.offload and config.rollout.engine == "colocated" and samples(config)
    return 2 * most / card.host if is_lent else 0.0
