"""Seconds of a rollout by phases, and what the ranks send each other for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoints_conversion.families import sizes_of
from megatron_nft.config import Config
from megatron_nft.plan import cards
from megatron_nft.plan.cards import Card
from megatron_nft.plan.layers import (
    GPUS_A_NODE,
    bytes_of,
    exchanged_bytes,
    head_time,
    kind_of,
    layer_time,
    link,
)
from megatron_nft.plan.memory import GRADIENT_BYTES, Memory, layer_parameters
from megatron_nft.plan.parameters import Held
from megatron_nft.plan.sampling import num_engines, sampling_seconds
from megatron_nft.plan.workload import Workload

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# of micro-batches: of an update's and of a rollout's (docs/benchmarks.md, Packing)
FILL = 0.95, 0.99
# of AdamW, a parameter: gradient 4, main weight 8, moments 16, weight in bf16 2
ADAMW_BYTES = 30
OTHER = 0.014  # of a step: packing, the objective, clearing gradients (docs/benchmarks.md)


@dataclass(frozen=True)
class Traffic:
    """Bytes that each GPU sends in a rollout for one purpose."""

    what: str
    num_ranks: int
    sent: float
    is_nvlink: bool


@dataclass(frozen=True)
class Times:
    """Seconds of one rollout."""

    sampling: float
    old_logp: float
    training: float
    weights: float  # handed to the engines
    offloading: float  # off the GPUs and back
    between: float
    updates: int
    micro_batches: int  # of an update, on each data-parallel rank
    trained_tokens: float
    num_gpus: int  # those of servers too
    overlaps: bool  # answers are sampled while others are trained on
    traffic: tuple[Traffic, ...]

    @property
    def total(self) -> float:
        rest = self.old_logp + self.training
        both = max(self.sampling, rest) if self.overlaps else self.sampling + rest
        return both + self.weights + self.offloading + self.between

    @property
    def tokens_per_gpu(self) -> float:
        """Trained tokens a second and GPU."""
        return self.trained_tokens / self.total / self.num_gpus


@dataclass(frozen=True)
class _Passes:
    """A pass through all micro-batches on the ranks of one pipeline."""

    forward: float
    both: float
    micro_batches: int
    rows: float  # of a micro-batch, on a context-parallel rank


def times_of(
    hf_config: PretrainedConfig,
    config: Config,
    card: Card,
    num_gpus: int,
    held: Sequence[Held],
    ranks: Sequence[Memory],
    workload: Workload,
) -> Times:
    """What a rollout takes; checkpoints are written, and answers judged, beside other work."""
    parallel = config.parallel
    num_data = num_gpus // (parallel.tensor * parallel.pipeline * parallel.context)
    updates = max(1, workload.num_trained // config.optimizer.questions_per_minibatch)
    updates *= config.optimizer.epochs
    epoch_tokens = workload.trained_tokens * config.optimizer.epochs
    update = _passes(hf_config, config, card, workload, epoch_tokens / updates / num_data, FILL[0])
    before = _passes(hf_config, config, card, workload, workload.trained_tokens / num_data, FILL[1])
    reduced, reduce_s = _reduction(config, card, num_gpus, held)
    training = (update.both * (1 + OTHER) + reduce_s + _adamw(config, card, ranks)) * updates
    weights, weights_s = _weights(hf_config, config, card)
    offloading = 0.0
    if config.memory.offload:
        offloading = 2 * max(m.optimizer + m.gradients for m in ranks) / card.host
    is_remote = config.rollout.engine == "remote"
    layers = sizes_of(hf_config).num_layers / parallel.pipeline
    passes = updates * update.micro_batches, before.micro_batches * workload.passes_before
    traffic = _layers_traffic(hf_config, config, (update, before), passes, layers)
    return Times(
        sampling=sampling_seconds(hf_config, config, card, num_gpus, workload),
        old_logp=before.forward * workload.passes_before,
        training=training,
        weights=weights_s,
        offloading=offloading,
        between=3 * cards.BETWEEN_PHASES_S,
        updates=updates,
        micro_batches=update.micro_batches,
        trained_tokens=workload.trained_tokens,
        num_gpus=num_gpus + is_remote * num_engines(config, num_gpus) * config.rollout.tensor,
        overlaps=is_remote and config.rollout.max_steps_off_policy > 0,
        traffic=(
            *traffic,
            Traffic("gradients and weights", reduced[0], reduced[1] * updates, reduced[2]),
            weights,
        ),
    )


def _passes(
    hf_config: PretrainedConfig,
    config: Config,
    card: Card,
    workload: Workload,
    tokens: float,
    fill: float,
) -> _Passes:
    """Of so many tokens of a data-parallel rank; the one with the longest sequence ends last."""
    parallel, sizes = config.parallel, sizes_of(hf_config)
    tokens = max(tokens, workload.prompt_tokens + workload.lengths()[-1])
    micro_batches = max(1, math.ceil(tokens / (config.optimizer.tokens_per_microbatch * fill)))
    rows = tokens / micro_batches / parallel.context
    layer = layer_time(hf_config, config, card, rows, workload.attended)
    predicted = rows * workload.answer_tokens / workload.sequence_tokens
    layers, stages = sizes.num_layers / parallel.pipeline, parallel.pipeline
    away = _between_stages(hf_config, config, card, rows)

    def through(layer_s: float, num_products: int, times: int) -> float:
        """The last stage has the head; the others wait for it at each micro-batch."""
        head = head_time(hf_config, config, card, predicted, num_products=num_products)
        stage = layers * layer_s + times * away
        filling = (stages - 1) / parallel.virtual_pipeline * stage
        return micro_batches * (stage + head) + filling

    return _Passes(
        forward=through(layer.forward, 1, 1),
        both=through(layer.forward + layer.backward, 3, 2),
        micro_batches=micro_batches,
        rows=rows,
    )


def _between_stages(hf_config: PretrainedConfig, config: Config, card: Card, rows: float) -> float:
    """Seconds of handing a micro-batch on; stages are on different nodes, or may be."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        return 0.0
    return _handed_on(hf_config, config, rows) * parallel.virtual_pipeline / card.network


def _handed_on(hf_config: PretrainedConfig, config: Config, rows: float) -> float:
    shared = config.parallel.tensor if config.parallel.sequence else 1
    return bytes_of(config) * rows * hf_config.hidden_size / shared


def _reduction(
    config: Config, card: Card, num_gpus: int, held: Sequence[Held]
) -> tuple[tuple[int, float, bool], float]:
    """Ranks, bytes and link of an update's gradients and new weights, and the seconds.

    Scattered float32 gradients and gathered weights; without the distributed optimizer gradients
    are gathered instead. Nothing of it overlaps with backward (policy/optimizer.py).
    """
    parallel = config.parallel
    num_ranks = num_gpus // (parallel.tensor * parallel.pipeline)
    gathered = bytes_of(config) if parallel.distributed_optimizer else GRADIENT_BYTES
    most = max(one.dense for one in held), max(one.expert for one in held)
    sharing = num_ranks, max(1, num_ranks * parallel.tensor // parallel.expert)
    sent = sum(
        number * (GRADIENT_BYTES + gathered) * (ranks - 1) / ranks
        for number, ranks in zip(most, sharing, strict=True)
    )
    is_nvlink = num_gpus <= GPUS_A_NODE
    return (num_ranks, sent, is_nvlink), sent / (card.nvlink if is_nvlink else card.network)


def _adamw(config: Config, card: Card, ranks: Sequence[Memory]) -> float:
    each = 8 if config.model.dtype == "float32" else 12  # bytes of state: memory.py
    most = max(memory.optimizer for memory in ranks) / each
    return most * ADAMW_BYTES / (cards.ADAMW[kind_of(config)] * card.bandwidth)


def _weights(hf_config: PretrainedConfig, config: Config, card: Card) -> tuple[Traffic, float]:
    """Every rank gets every tensor whole, checks it by digests (two passes) and keeps its part."""
    parallel = config.parallel
    held_by = parallel.least_processes
    size = bytes_of(config) * _num_parameters(hf_config)
    is_nvlink = held_by <= GPUS_A_NODE
    sent = size * (held_by - 1) / held_by
    seconds = sent / (card.nvlink if is_nvlink else card.network)
    return (
        Traffic("weights to the engines", held_by, sent, is_nvlink),
        seconds + 3 * size / (cards.DECODING * card.bandwidth),
    )


def _num_parameters(hf_config: PretrainedConfig) -> float:
    tables = 1 if hf_config.tie_word_embeddings else 2
    tables *= hf_config.vocab_size * hf_config.hidden_size
    return hf_config.num_hidden_layers * layer_parameters(hf_config) + tables


def _layers_traffic(
    hf_config: PretrainedConfig,
    config: Config,
    passes: Sequence[_Passes],
    counts: Sequence[int],
    layers: float,
) -> list[Traffic]:
    """What the ranks of a layer, and of neighbouring stages, exchange in a rollout's passes."""
    (update, before), (num_updates, num_before) = passes, counts
    parallel = config.parallel
    sizes = {"tensor": parallel.tensor, "context": parallel.context, "expert": parallel.expert}
    sent: dict[str, float] = {}
    again = 2 if config.memory.recompute == "full" else 1
    for one, number, is_backward in (
        (before, num_before, False),
        (update, num_updates * again, False),
        (update, num_updates, True),
    ):
        each = exchanged_bytes(hf_config, config, one.rows, is_backward=is_backward)
        for kind, size in each.items():
            sent[kind] = sent.get(kind, 0.0) + size * number * layers
    found = []
    for kind, size in sent.items():
        is_nvlink = link(config, cards.H100, kind) == cards.H100.nvlink
        found.append(Traffic(f"layers, {kind} ranks", sizes[kind], size, is_nvlink))
    if parallel.pipeline > 1:
        steps = 2 * num_updates * update.rows + num_before * before.rows
        handed = _handed_on(hf_config, config, steps) * parallel.virtual_pipeline
        found.append(Traffic("between stages", parallel.pipeline, handed, False))
    return found
