"""A recipe on so many GPUs: what each holds, and how long a rollout takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_nft.config import Config
from megatron_nft.plan.cards import Card
from megatron_nft.plan.memory import GIB, Memory, memory_of
from megatron_nft.plan.parameters import Held, held_by_ranks
from megatron_nft.plan.sampling import sampling_seconds
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
    evaluation: float  # seconds of one

    @property
    def seconds(self) -> float:
        """Of the whole recipe."""
        every = self.config.evaluate.every
        num_evaluations = self.config.rollouts / every if every else 1
        return self.config.rollouts * self.times.total + num_evaluations * self.evaluation

    @property
    def peak(self) -> float:
        return max(memory.peak for memory in self.ranks)

    @property
    def fits(self) -> bool:
        return self.peak <= ROOM * self.card.memory_gib * GIB


def plan_for(
    hf_config: PretrainedConfig,
    config: Config,
    num_gpus: int,
    card: Card,
    workload: Workload,
    held: Sequence[Held] = (),
) -> Plan:
    """Args:
    held: where it is known; the same for any number of GPUs with this layout.
    """
    held = held or held_by_ranks(hf_config, config, num_gpus)
    ranks = [memory_of(hf_config, config, one, num_gpus, card) for one in held]
    times = times_of(hf_config, config, card, num_gpus, held, ranks, workload)
    evaluation = _evaluation(hf_config, config, card, num_gpus, workload)
    return Plan(config, num_gpus, card, workload, held, ranks, times, evaluation)


def _evaluation(
    hf_config: PretrainedConfig, config: Config, card: Card, num_gpus: int, workload: Workload
) -> float:
    asked = replace(workload, num_asked=workload.num_evaluated, num_answers=1)
    return sampling_seconds(hf_config, config, card, num_gpus, asked)
