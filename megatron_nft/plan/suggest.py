"""What to change where a recipe does not fit, or could be faster."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

from megatron_nft import recipe
from megatron_nft.config import Config
from megatron_nft.plan.estimate import ROOM, Plan, plan_for
from megatron_nft.plan.memory import GIB, cached_tokens
from megatron_nft.plan.parameters import held_by_ranks
from megatron_nft.policy.layout import check_fp8, check_layout
from megatron_nft.preflight import check_engine_layout
from megatron_nft.validation import leaves, validate

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MAX_TENSOR, MAX_PIPELINE = 8, 8
RECOMPUTES = ("none", "selective", "full")
NUM_SUGGESTED = 5
ALIKE = 0.97  # of a rollout's time: what is closer is the same
NUM_SEQUENCES = (256, 512, 1024)  # of an engine, at once
WORTH_IT, NUM_ENGINES_SUGGESTED = 0.9, 2  # of the time of sampling


def largest_fraction(hf_config: PretrainedConfig, plan: Plan) -> float:
    """The most of a GPU that an engine can have beside this layout; 0 where that is no help."""
    room, whole = ROOM * plan.card.memory_gib * GIB, plan.card.memory_gib * GIB
    if not plan.ranks[0].engine or max(memory.training for memory in plan.ranks) > room:
        return 0.0
    beside = max(memory.sampling - memory.engine for memory in plan.ranks)
    fraction = math.floor(100 * (room - beside) / whole) / 100
    rollout = replace(plan.config.rollout, memory_fraction=fraction)
    config = replace(plan.config, rollout=rollout)
    return fraction if cached_tokens(hf_config, config, plan.card) >= config.longest else 0.0


def suggestions(hf_config: PretrainedConfig, plan: Plan) -> list[Plan]:
    """Layouts that fit, the fastest first; where the recipe's own fits, the faster ones alone.

    Where it does not, the one with the fewest changes comes before them.
    """
    least = ALIKE * plan.times.total if plan.fits else math.inf
    found = []
    for tensor, pipeline in product(_powers(MAX_TENSOR), _powers(MAX_PIPELINE)):
        found += [p for p in _split(hf_config, plan, tensor, pipeline) if p.times.total < least]
    found.sort(key=lambda p: p.times.total)
    if found and not plan.fits:
        found.insert(0, min(found, key=lambda p: len(recipe.differences(plan.config, p.config))))
    return list({id(p): p for p in found}.values())[:NUM_SUGGESTED]


def _split(hf_config: PretrainedConfig, plan: Plan, tensor: int, pipeline: int) -> Iterator[Plan]:
    """Of every way to save memory with these ranks, what fits."""
    config, held, before = plan.config, (), plan.config.parallel
    sequence = before.sequence if tensor == before.tensor else tensor > 1
    split = {"tensor": tensor, "pipeline": pipeline, "sequence": sequence}
    parallel = replace(before, **split, virtual_pipeline=1)
    for recompute, offload in product(RECOMPUTES, (False, True)):
        memory = replace(config.memory, recompute=recompute, offload=offload)
        one = replace(config, parallel=parallel, memory=memory)
        try:
            validate(one)
            check_layout(hf_config, parallel, plan.num_gpus)
            check_fp8(hf_config, one)
        except ValueError:
            continue
        held = held or held_by_ranks(hf_config, one, plan.num_gpus)
        made = plan_for(hf_config, one, plan.num_gpus, plan.card, plan.workload, held)
        if made.fits:
            yield made


def faster_sampling(hf_config: PretrainedConfig, plan: Plan) -> list[Plan]:
    """Other engines on as many GPUs, in the same share of memory; the fastest first."""
    found = []
    for tensor in _powers(MAX_TENSOR):
        made = list(_with_engines(hf_config, plan, tensor))
        least = min((one.times.sampling for one in made), default=math.inf)
        if least < WORTH_IT * plan.times.sampling:
            found.append(next(one for one in made if ALIKE * one.times.sampling <= least))
    return sorted(found, key=lambda one: one.times.sampling)[:NUM_ENGINES_SUGGESTED]


def _with_engines(hf_config: PretrainedConfig, plan: Plan, tensor: int) -> Iterator[Plan]:
    """The fewest answers at once first."""
    before = plan.config.rollout
    num_servers, rest = divmod(before.num_servers * before.tensor, tensor)
    if before.engine == "remote" and (rest or before.servers):
        return
    for num_sequences in NUM_SEQUENCES:
        rollout = replace(before, tensor=tensor, max_sequences=num_sequences)
        if before.engine == "remote":
            rollout = replace(rollout, num_servers=num_servers)
        config = replace(plan.config, rollout=rollout)
        try:
            validate(config)
            check_engine_layout(config, hf_config, plan.num_gpus)
        except ValueError:
            continue
        args = config, plan.num_gpus, plan.card, plan.workload, plan.held
        made = plan_for(hf_config, *args)
        if made.engine_fits:
            yield made


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def changes(config: Config, other: Config) -> str:
    """As words of a command line."""
    values = dict(leaves(other))
    return " ".join(f"{key}={_said(values[key])}" for key in recipe.differences(config, other))


def _said(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
