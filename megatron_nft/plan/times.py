"""Seconds of a rollout by phases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoints_conversion.families import sizes_of
from megatron_nft.config import Config
from megatron_nft.objectives import is_per_token
from megatron_nft.plan import cards, traffic
from megatron_nft.plan.cards import Card
from megatron_nft.plan.layers import head_time, layer_time
from megatron_nft.plan.memory import Memory
from megatron_nft.plan.parameters import Held
from megatron_nft.plan.sampling import num_engines, rollout_seconds
from megatron_nft.plan.shape import kind_of, samples
from megatron_nft.plan.traffic import Traffic
from megatron_nft.plan.workload import Workload

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# of micro-batches: of an update's and of a rollout's (docs/benchmarks.md, Packing)
FILL = 0.95, 0.99
# of AdamW, a parameter: gradient 4, main weight 8, moments 16, weight in bf16 2
ADAMW_BYTES = 30
OTHER = 0.014  # of a step: packing, the objective, clearing gradients (docs/benchmarks.md)


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
    def lent(self) -> float:
        """What each waking of the engines costs, in an evaluation too."""
        return self.weights + self.offloading + self.between

    @property
    def total(self) -> float:
        rest = self.old_logp + self.training
        both = max(self.sampling, rest) if self.overlaps else self.sampling + rest
        return both + self.lent

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
    model = hf_config, config, card, num_gpus
    rollout, options = config.rollout, config.optimizer
    updates = max(1, workload.num_trained // options.questions_per_minibatch) * options.epochs
    tokens = workload.trained_tokens
    update = _passes(*model, workload, tokens * options.epochs / updates, FILL[0])
    before = _passes(*model, workload, tokens, FILL[1])
    reduced = traffic.reduction(config, card, num_gpus, held)
    an_update = update.both * (1 + OTHER) + reduced.seconds + _adamw(config, card, ranks)
    handed = traffic.weights(*model)
    is_remote, is_sampled = rollout.engine == "remote", samples(config)
    return Times(
        sampling=rollout_seconds(*model, workload),
        old_logp=before.forward * workload.passes_before,
        training=an_update * updates,
        weights=handed.seconds if is_sampled else 0.0,
        offloading=traffic.offloading(config, card, max(m.optimizer for m in ranks)),
        between=is_sampled * (1 if is_remote else 3) * cards.BETWEEN_PHASES_S,
        updates=updates,
        micro_batches=update.micro_batches,
        trained_tokens=tokens,
        num_gpus=num_gpus + is_remote * num_engines(config, num_gpus) * rollout.tensor,
        overlaps=is_remote and rollout.max_steps_off_policy > 0,
        traffic=(
            *traffic.of_layers(
                hf_config,
                config,
                num_gpus,
                (before.micro_batches * workload.passes_before, before.rows),
                (update.micro_batches * updates, update.rows),
            ),
            Traffic(reduced.what, reduced.num_ranks, reduced.sent * updates, reduced.is_nvlink),
            *([handed] if is_sampled else []),
        ),
    )


def _passes(
    hf_config: PretrainedConfig,
    config: Config,
    card: Card,
    num_gpus: int,
    workload: Workload,
    tokens: float,
    fill: float,
) -> _Passes:
    """Of so many tokens over all ranks; the one with the longest sequence ends last."""
    parallel = config.parallel
    layers, stages = sizes_of(hf_config).num_layers / parallel.pipeline, parallel.pipeline
    num_data = num_gpus // (parallel.tensor * parallel.pipeline * parallel.context)
    tokens = max(tokens / num_data, workload.prompt_tokens + workload.lengths()[-1])
    micro_batches = _num_micro_batches(config, tokens, fill)
    rows = tokens / micro_batches / parallel.context
    layer = layer_time(hf_config, config, card, rows, workload.attended)
    predicted = rows * workload.answer_tokens / workload.sequence_tokens
    away = traffic.between_stages(hf_config, config, card, num_gpus, rows)

    def through(layer_s: float, num_products: int, times: int) -> float:
        """The last stage has the head; the others wait for it at each micro-batch."""
        head = head_time(hf_config, config, card, predicted, num_products)
        stage = layers * layer_s + times * away
        filling = (stages - 1) / parallel.virtual_pipeline * stage
        return micro_batches * (stage + head) + filling

    # gradients need the logits again where a token's depends on its whole sequence
    with_gradients = 3 if is_per_token(config.objective) else 4
    return _Passes(
        forward=through(layer.forward, 1, 1),
        both=through(layer.forward + layer.backward, with_gradients, 2),
        micro_batches=micro_batches,
        rows=rows,
    )


def _num_micro_batches(config: Config, tokens: float, fill: float) -> int:
    """An interleaved schedule takes them in rounds of one a pipeline rank."""
    parallel = config.parallel
    multiple = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
    number = math.ceil(tokens / (config.optimizer.tokens_per_microbatch * fill))
    return max(1, math.ceil(number / multiple)) * multiple


def _adamw(config: Config, card: Card, ranks: Sequence[Memory]) -> float:
    each = 8 if config.model.dtype == "float32" else 12  # bytes of state: memory.py
    most = max(memory.optimizer for memory in ranks) / each
    return most * ADAMW_BYTES / (cards.ADAMW[kind_of(config)] * card.bandwidth)
