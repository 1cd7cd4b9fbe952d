"""A recipe on so many GPUs: what each holds, and how long a rollout takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_nft.config import Config
from megatron_nft.plan.cards import Card
from megatron_nft.plan.memory import GIB, Memory, cached_tokens, memory_of
from megatron_nft.plan.parameters import Held, held_by_ranks
from megatron_nft.plan.sampling import sampling_seconds
from megatron_nft.plan.shape import has_engine
from megatron_nft.plan.times import Times, times_of
from megatron_nft.plan.workload import Workload

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROOM = 0.95  # of a card's memory; the rest is for the allocator's gaps


@dataclass(frozen=True)
class Plan:
    """A recipe on so many GPUs of a kind."""

    config: Config
    num_gpus: int  # that train
    card: Card
    workload: Workload
    held: Sequence[Held]  # one a pipeline stage, as the next
    ranks: Sequence[Memory]
    times: Times  # of a rollout
    evaluation: float  # seconds of one, of the sets whose files are here
    num_cached: float  # tokens whose keys and values an engine's GPU has room for

    @property
    def seconds(self) -> float:
        """Of the whole recipe: one evaluation before it, and one after its last rollout."""
        every, rollouts = self.config.evaluate.every, self.config.rollouts
        num_evaluations = 1 + math.ceil(rollouts / every) if every else 0
        return rollouts * self.times.total + num_evaluations * self.evaluation

    @property
    def peak(self) -> float:
        return max(memory.peak for memory in self.ranks)

    @property
    def engine_fits(self) -> bool:
        """Whether an engine, here or in a server, can give one answer of the greatest length."""
        return not has_engine(self.config) or self.num_cached >= self.config.longest

    @property
    def fits(self) -> bool:
        return self.engine_fits and self.peak <= ROOM * self.card.memory_gib * GIB


def plan_for(
    hf_config: PretrainedConfig,
    config: Config,
    num_gpus: int,
    card: Card,
    workload: Workload,
    held: Sequence[Held] = (),
) -> Plan:
    """What this recipe needs and takes there.

    Args:
        held: where it is known; the same for any number of GPUs with this layout.
    """
    held = held or held_by_ranks(hf_config, config, num_gpus)
    ranks = [memory_of(hf_config, config, one, num_gpus, card) for one in held]
    times = times_of(hf_config, config, card, num_gpus, held, ranks, workload)
    evaluation = 0.0
    if num_questions := sum(questions for questions, _ in workload.evaluated):  # asked at once
        numbers = num_questions, workload.num_evaluated / num_questions
        evaluation = times.lent
        evaluation += sampling_seconds(hf_config, config, card, num_gpus, workload, *numbers)
    return Plan(
        config,
        num_gpus,
        card,
        workload,
        held,
        ranks,
        times,
        evaluation=evaluation,
        num_cached=cached_tokens(hf_config, config, card),
    )
