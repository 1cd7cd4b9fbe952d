"""`megatron-nft plan`: whether a recipe fits its GPUs, and what to change where it does not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints_conversion.hf_files import read_hf_config
from megatron_nft import preflight, recipe
from megatron_nft.config import Config, MemoryConfig
from megatron_nft.plan.cards import CARDS, CONTEXT_GIB, Card
from megatron_nft.plan.memory import GIB, Memory, cached_tokens, engine_weights, memory_of
from megatron_nft.plan.parameters import Held, held_by_ranks
from megatron_nft.policy.layout import check_fp8, check_layout
from megatron_nft.validation import leaves

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROOM = 0.95  # of a card's memory; the rest is for the allocator's gaps
MAX_TENSOR, MAX_PIPELINE = 8, 8
RECOMPUTES = ("none", "selective", "full")
NUM_SUGGESTED = 5


@dataclass(frozen=True)
class Plan:
    """A recipe on so many GPUs of a kind."""

    config: Config
    num_gpus: int
    card: Card
    ranks: list[Memory]  # one a pipeline stage

    @property
    def peak(self) -> float:
        return max(memory.peak for memory in self.ranks)

    @property
    def fits(self) -> bool:
        return self.peak <= ROOM * self.card.memory_gib * GIB


def plan(path: Path, num_gpus: int, gpu: str, overrides: Sequence[str]) -> int:
    """Print what a recipe needs and whether that is there; 0 where it can run, else 1.

    Raises:
        ValueError: a recipe, a layout or a model's config.json that cannot be used.
    """
    if gpu not in CARDS:
        raise ValueError(f"--gpu was {gpu!r}; it may be {', '.join(CARDS)}")
    config, card = recipe.load(path, overrides), CARDS[gpu]
    with preflight.naming("model.path"):
        hf_config = read_hf_config(Path(config.model.path))
    check_layout(hf_config, config.parallel, num_gpus)
    check_fp8(hf_config, config)
    preflight.check_lengths(config, hf_config)
    preflight.check_engine_layout(config, hf_config, num_gpus)
    made = plan_for(hf_config, config, num_gpus, card)
    print(table(hf_config, made))
    missing = list(missing_files(config))
    for what in missing:
        print(f"missing: {what}")
    if made.fits:
        print("it fits" + (", but not all files are here" if missing else ""))
        return int(bool(missing))
    print(f"it does not fit: a GPU has {ROOM * card.memory_gib:.1f} GiB to use")
    if fraction := largest_fraction(made):
        print(f"  fits: rollout.memory_fraction={fraction:.2f}")
    for suggested in suggestions(hf_config, config, num_gpus, card):
        print(f"  fits, {suggested.peak / GIB:.1f} GiB: {_changes(config, suggested.config)}")
    return 1


def plan_for(hf_config: PretrainedConfig, config: Config, num_gpus: int, card: Card) -> Plan:
    held = held_by_ranks(hf_config, config, num_gpus)
    return _plan_of(hf_config, config, num_gpus, card, held)


def _plan_of(
    hf_config: PretrainedConfig, config: Config, num_gpus: int, card: Card, held: Sequence[Held]
) -> Plan:
    ranks = [memory_of(hf_config, config, one, num_gpus, card) for one in held]
    return Plan(config, num_gpus, card, ranks)


def table(hf_config: PretrainedConfig, plan: Plan) -> str:
    """GiB of each pipeline stage's GPUs, by what they are for."""
    parallel = plan.config.parallel
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    lines = [
        f"{plan.config.model.path} on {plan.num_gpus} × {plan.card.name} "
        f"({plan.card.memory_gib:g} GiB)",
        f"tensor {parallel.tensor}, pipeline {parallel.pipeline}, context {parallel.context}, "
        f"expert {parallel.expert}, data {plan.num_gpus // model_ranks}; "
        f"recompute {plan.config.memory.recompute}",
        f"{'GiB of a GPU':<24}" + "".join(f"{f'stage {m.stage}':>10}" for m in plan.ranks),
    ]
    rows = {
        "weights": [m.weights for m in plan.ranks],
        "gradients": [m.gradients for m in plan.ranks],
        "optimizer": [m.optimizer for m in plan.ranks],
        "activations (estimate)": [m.activations for m in plan.ranks],
        "head": [m.head for m in plan.ranks],
        "context (estimate)": [CONTEXT_GIB * GIB for _ in plan.ranks],
        "in training": [m.training for m in plan.ranks],
    }
    if plan.ranks[0].engine:
        rows |= {
            "vLLM's share": [m.engine for m in plan.ranks],
            "while it samples": [m.sampling for m in plan.ranks],
        }
    for name, row in rows.items():
        lines.append(f"{name:<24}" + "".join(f"{value / GIB:>10.1f}" for value in row))
    if plan.ranks[0].engine:
        lines.append(_engine_line(hf_config, plan))
    return "\n".join(lines)


def _engine_line(hf_config: PretrainedConfig, plan: Plan) -> str:
    config, tokens = plan.config, cached_tokens(hf_config, plan.config, plan.card)
    weights = engine_weights(hf_config, config) / GIB
    if tokens < config.longest:
        return (
            f"engine: {weights:.1f} GiB of weights leave no room for one answer; raise "
            "rollout.memory_fraction or rollout.tensor"
        )
    return (
        f"engine: {weights:.1f} GiB of weights, {tokens:,.0f} tokens of keys and values: "
        f"{tokens / config.longest:.0f} answers of the greatest length at once"
    )


def missing_files(config: Config) -> Iterator[str]:
    """What the recipe names and is not there."""
    model = Path(config.model.path)
    if not any(model.glob("*.safetensors")):
        yield f"model.path: {model} has no *.safetensors"
    if not any((model / name).is_file() for name in preflight.TOKENIZER_FILES):
        yield f"model.path: {model} has no tokenizer ({', '.join(preflight.TOKENIZER_FILES)})"
    named = {"data.train": config.data.train, "evaluate.sets": config.evaluate.sets}
    for key, sources in named.items():
        yield from (f"{key}: {s.path}" for s in sources if not Path(s.path).is_file())


def largest_fraction(plan: Plan) -> float:
    """The most of a GPU that an engine can have beside this layout; 0 where that is no help."""
    room = ROOM * plan.card.memory_gib * GIB
    if max(memory.training for memory in plan.ranks) > room:
        return 0.0
    beside = max(memory.sampling - memory.engine for memory in plan.ranks)
    return max(0.0, math.floor(100 * (room - beside) / (plan.card.memory_gib * GIB)) / 100)


def suggestions(
    hf_config: PretrainedConfig, config: Config, num_gpus: int, card: Card
) -> list[Plan]:
    """Layouts that fit: the fewest changes first, then what splits and computes again the least."""
    found = []
    for tensor, pipeline in product(_powers(MAX_TENSOR), _powers(MAX_PIPELINE)):
        split = {"tensor": tensor, "pipeline": pipeline, "sequence": tensor > 1}
        parallel = replace(config.parallel, **split, virtual_pipeline=1)
        changed = replace(config, parallel=parallel)
        try:
            check_layout(hf_config, parallel, num_gpus)
            check_fp8(hf_config, changed)
        except ValueError:
            continue
        held = held_by_ranks(hf_config, changed, num_gpus)
        for recompute, offload in product(RECOMPUTES, (False, True)):
            memory = MemoryConfig(recompute=recompute, offload=offload)
            one = replace(changed, memory=memory)
            made = _plan_of(hf_config, one, num_gpus, card, held)
            if made.fits:
                num_changes = len(recipe.differences(config, one))
                order = num_changes, tensor * pipeline, RECOMPUTES.index(recompute), offload
                found.append((*order, made))
    found.sort(key=lambda entry: entry[:-1])
    return [made for *_, made in found[:NUM_SUGGESTED]]


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def _changes(config: Config, other: Config) -> str:
    values = dict(leaves(other))
    return " ".join(f"{key}={_said(values[key])}" for key in recipe.differences(config, other))


def _said(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
