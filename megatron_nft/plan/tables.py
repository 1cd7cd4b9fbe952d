"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_nft.plan.cards import CONTEXT_GIB
from megatron_nft.plan.estimate import Plan
from megatron_nft.plan.memory import GIB, engine_weights, memory_of
from megatron_nft.plan.sampling import num_engines
from megatron_nft.plan.shape import has_engine
from megatron_nft.plan.suggest import RECOMPUTES

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def memory(hf_config: PretrainedConfig, plan: Plan) -> str:
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
    lines.append(_recomputes(hf_config, plan))
    if has_engine(plan.config):
        lines.append(_engine_line(hf_config, plan))
    return "\n".join(lines)


def _recomputes(hf_config: PretrainedConfig, plan: Plan) -> str:
    found = []
    for recompute in RECOMPUTES:
        memory = replace(plan.config.memory, recompute=recompute)
        config = replace(plan.config, memory=memory)
        args = hf_config, config, plan.held[0], plan.num_gpus, plan.card
        found.append(f"{recompute} {memory_of(*args).activations / GIB:.1f}")
    return f"activations of stage 0 by memory.recompute: {', '.join(found)}"


def _engine_line(hf_config: PretrainedConfig, plan: Plan) -> str:
    config, tokens = plan.config, plan.num_cached
    weights = engine_weights(hf_config, config) / GIB
    if not plan.engine_fits:
        return (
            f"engine: {weights:.1f} GiB of weights leave no room for one answer; raise "
            "rollout.memory_fraction or rollout.tensor"
        )
    return (
        f"engine: {weights:.1f} GiB of weights, {tokens:,.0f} tokens of keys and values: "
        f"{tokens / config.longest:.0f} answers of the greatest length at once"
    )


def times(plan: Plan) -> str:
    """Seconds of a rollout by phases."""
    found, load = plan.times, plan.workload
    sampled = f"{load.num_asks * load.num_asked * load.num_answers:,.0f} answers, "
    sampled += f"{num_engines(plan.config, plan.num_gpus)} engines"
    if load.num_asks > 1:
        sampled += f", {load.num_asks} times asked"
    updates = f"{found.updates} updates of {found.micro_batches} micro-batches a rank"
    rows = [
        ("sampling", found.sampling, sampled),
        ("old log-probabilities", found.old_logp, ""),
        ("training", found.training, updates),
        ("weights to the engines", found.weights, ""),
        ("off the GPUs and back", found.offloading, ""),
        ("between phases", found.between, "an assumption"),
        ("together", found.total, "sampling beside training" if found.overlaps else ""),
    ]
    lines = [
        "Seconds of a rollout, estimated from measured and published rates (plan/cards.py), with",
        f"prompts of {load.prompt_tokens:,.0f} and answers of {load.answer_tokens:,.0f} tokens on "
        f"the average, {load.mixed:.0%} of groups mixed:",
        "say better with --prompt-tokens, --answer-tokens and --mixed",
    ]
    lines += [f"{name:<24}{s:>10,.1f}   {note}".rstrip() for name, s, note in rows if s]
    rate = found.trained_tokens / found.total
    lines.append(f"trained on {rate:,.0f} tokens/s, {found.tokens_per_gpu:,.0f} a GPU")
    return "\n".join(lines)


def traffic(plan: Plan) -> str:
    """GB that each GPU sends in a rollout."""
    lines = [f"{'GB a GPU sends':<26}{'ranks':>6}{'GB':>10}   over"]
    for one in plan.times.traffic:
        over = "NVLink" if one.is_nvlink else "the network"
        lines.append(f"{one.what:<26}{one.num_ranks:>6}{one.sent / 1e9:>10,.1f}   {over}")
    return "\n".join(lines if len(lines) > 1 else ["no GPU sends anything"])


def _evaluations(plan: Plan) -> str:
    options, load = plan.config.evaluate, plan.workload
    if not (options.every and options.sets):
        return "no evaluations"
    counted = f"{load.num_evaluated:,} answers each, {plan.evaluation:,.0f} s"
    if missing := len(options.sets) - len(load.evaluated):
        counted += f", {missing} of {len(options.sets)} sets not counted: they are not here"
    return f"evaluations every {options.every} ({counted})"


def scaling(plan: Plan, others: Iterable[Plan]) -> str:
    """The whole recipe on these and other numbers of GPUs."""
    lines = [
        f"{plan.config.rollouts} rollouts, {_evaluations(plan)}",
        f"{'GPUs':>6}{'s a rollout':>13}{'tokens/s/GPU':>14}{'days':>8}{'GPU-hours':>11}",
    ]
    plans = {one.num_gpus: one for one in (*others, plan)}
    for _, one in sorted(plans.items()):
        hours = one.seconds / 3600
        row = f"{one.times.num_gpus:>6,}{one.times.total:>13,.0f}{one.times.tokens_per_gpu:>14,.0f}"
        row += f"{hours / 24:>8.1f}{hours * one.times.num_gpus:>11,.0f}"
        lines.append(row + ("" if one.fits else "   does not fit"))
    return "\n".join(lines)
