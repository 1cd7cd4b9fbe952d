"""`megatron-nft plan`: whether a recipe fits its GPUs, how long it takes, and what to change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints_conversion.hf_files import read_hf_config
from megatron_nft import preflight, recipe
from megatron_nft.config import Config
from megatron_nft.plan import tables
from megatron_nft.plan.cards import CARDS, Card
from megatron_nft.plan.estimate import ROOM, Plan, plan_for
from megatron_nft.plan.memory import GIB
from megatron_nft.plan.suggest import changes, faster_sampling, largest_fraction, suggestions
from megatron_nft.plan.workload import Workload, workload_of
from megatron_nft.policy.layout import check_fp8, check_layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SCALES = (32, 64, 128, 256, 512, 1024)  # GPUs


@dataclass(frozen=True)
class Asked:
    """What the command line says beside the recipe; tokens of 0: assumed."""

    num_gpus: int = 8
    gpu: str = "h100"
    answer_tokens: float = 0
    prompt_tokens: float = 0
    mixed: float = 0.5


def plan(path: Path, asked: Asked, overrides: Sequence[str]) -> int:
    """Print what a recipe needs and whether that is there; 0 where it can run, else 1.

    Raises:
        ValueError: a recipe, a layout or a model's config.json that cannot be used.
    """
    config, card = recipe.load(path, overrides), _card(asked.gpu)
    with preflight.naming("model.path"):
        hf_config = read_hf_config(Path(config.model.path))
    _check(hf_config, config, asked.num_gpus, card)
    made = plan_for(hf_config, config, asked.num_gpus, card, _workload(config, asked))
    print(tables.memory(hf_config, made), end="\n\n")
    print(tables.times(made), end="\n\n")
    print(tables.traffic(made), end="\n\n")
    print(tables.scaling(made, _scaled(hf_config, made)), end="\n\n")
    missing = list(missing_files(config))
    for what in missing:
        print(f"missing: {what}")
    if made.fits:
        print("it fits" + (", but not all files are here" if missing else ""))
    else:
        print(f"it does not fit: a GPU has {ROOM * card.memory_gib:.1f} GiB to use", end="")
        print("" if made.engine_fits else ", and an engine is to hold one answer at least")
        if fraction := largest_fraction(hf_config, made):
            print(f"  fits: rollout.memory_fraction={fraction:.2f}")
    for other in suggestions(hf_config, made):
        print(f"  {other.times.total:,.0f} s a rollout, {other.peak / GIB:.1f} GiB: ", end="")
        print(changes(config, other.config))
    for other in faster_sampling(hf_config, made):
        print(f"  {other.times.sampling:,.0f} s of sampling: {changes(config, other.config)}")
    return int(not made.fits or bool(missing))


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


def _card(name: str) -> Card:
    if name not in CARDS:
        raise ValueError(f"--gpu was {name!r}; it may be {', '.join(CARDS)}")
    return CARDS[name]


def _workload(config: Config, asked: Asked) -> Workload:
    return workload_of(
        config,
        answer_tokens=asked.answer_tokens,
        prompt_tokens=asked.prompt_tokens,
        mixed=asked.mixed,
    )


def _check(hf_config: PretrainedConfig, config: Config, num_gpus: int, card: Card) -> None:
    if num_gpus < 1:
        raise ValueError(f"--gpus was {num_gpus}; it may be at least 1")
    check_layout(hf_config, config.parallel, num_gpus)
    check_fp8(hf_config, config)
    preflight.check_lengths(config, hf_config)
    preflight.check_engine_layout(config, hf_config, num_gpus)
    if config.fp8.format != "off" and config.fp8.recipe not in card.fp8:
        raise ValueError(
            f"fp8.recipe was {config.fp8.recipe}; on --gpu {card.name} it may be "
            f"{', '.join(card.fp8)}"
        )


def _scaled(hf_config: PretrainedConfig, plan: Plan) -> Iterator[Plan]:
    """The same layout on other numbers of GPUs, where it divides them; servers in proportion."""
    for num_gpus in SCALES:
        number = max(1, round(plan.config.rollout.num_servers * num_gpus / plan.num_gpus))
        config = replace(plan.config, rollout=replace(plan.config.rollout, num_servers=number))
        try:
            check_layout(hf_config, config.parallel, num_gpus)
            preflight.check_engine_layout(config, hf_config, num_gpus)
        except ValueError:
            continue
        yield plan_for(hf_config, config, num_gpus, plan.card, plan.workload, plan.held)
