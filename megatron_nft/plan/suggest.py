"""What to change where a recipe does not fit, or could be faster."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

from megatron_nft import recipe
from megatron_nft.config import Config, MemoryConfig
from megatron_nft.plan.estimate import ROOM, Plan, plan_for
from megatron_nft.plan.memory import GIB
from megatron_nft.plan.parameters import held_by_ranks
from megatron_nft.policy.layout import check_fp8, check_layout
from megatron_nft.validation import leaves

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MAX_TENSOR, MAX_PIPELINE = 8, 8
RECOMPUTES = ("none", "selective", "full")
NUM_SUGGESTED = 5
ALIKE = 0.97  # of a rollout's time: what is closer is the same


def largest_fraction(plan: Plan) -> float:
    """The most of a GPU that an engine can have beside this layout; 0 where that is no help."""
    room = ROOM * plan.card.memory_gib * GIB
    if max(memory.training for memory in plan.ranks) > room:
        return 0.0
    beside = max(memory.sampling - memory.engine for memory in plan.ranks)
    return max(0.0, math.floor(100 * (room - beside) / (plan.card.memory_gib * GIB)) / 100)


def suggestions(hf_config: PretrainedConfig, plan: Plan) -> list[Plan]:
    """Layouts that fit, the fastest first; where the recipe's own fits, the faster ones alone."""
    least = ALIKE * plan.times.total if plan.fits else math.inf
    found = []
    for tensor, pipeline in product(_powers(MAX_TENSOR), _powers(MAX_PIPELINE)):
        found += [p for p in _split(hf_config, plan, tensor, pipeline) if p.times.total < least]
    found.sort(key=lambda p: (p.times.total, len(recipe.differences(plan.config, p.config))))
    return found[:NUM_SUGGESTED]


def _split(hf_config: PretrainedConfig, plan: Plan, tensor: int, pipeline: int) -> list[Plan]:
    """Of every way to save memory with these ranks, what fits."""
    config = plan.config
    split = {"tensor": tensor, "pipeline": pipeline, "sequence": tensor > 1}
    parallel = replace(config.parallel, **split, virtual_pipeline=1)
    changed = replace(config, parallel=parallel)
    try:
        check_layout(hf_config, parallel, plan.num_gpus)
        check_fp8(hf_config, changed)
    except ValueError:
        return []
    held = held_by_ranks(hf_config, changed, plan.num_gpus)
    found = []
    for recompute, offload in product(RECOMPUTES, (False, True)):
        one = replace(changed, memory=MemoryConfig(recompute=recompute, offload=offload))
        made = plan_for(hf_config, one, plan.num_gpus, plan.card, plan.workload, held)
        if made.fits:
            found.append(made)
    return found


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def changes(config: Config, other: Config) -> str:
    """As words of a command line."""
    values = dict(leaves(other))
    return " ".join(f"{key}={_said(values[key])}" for key in recipe.differences(config, other))


def _said(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
