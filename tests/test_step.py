"""Whole optimizer steps, through Megatron's schedule, in every layout against plain PyTorch.

Processes cost far more than steps: three launches, of one, two and four processes, take all the
steps of this file, and the tests compare what came back.
"""

from collections.abc import Iterable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from policies import (
    Variant,
    configured,
    gradient,
    logp_on_lent_memory,
    policy_of,
    step,
    through_and_resumed,
    weights_of,
)
from processes import run
from reference import LR, Tensors, bfloat16_noise, distance, reference, reference_logp, worst
from toys import random_sequences, save_qwen2, weighted

from megatron_nft.config import MemoryConfig, ObjectiveConfig, ParallelConfig
from megatron_nft.policy.balance import deal
from megatron_nft.policy.packing import Sequence
from megatron_nft.updates import Updates

SEQUENCES = random_sequences(13)
LENGTHS = [s.num_tokens for s in SEQUENCES]
NFT = ObjectiveConfig(name="nft")
OBJECTIVES = {
    "nft": NFT,
    "nft, a mean over sequences": ObjectiveConfig(omega="uniform", denominator="sequence_mean"),
    "nft, ratios of sequences": ObjectiveConfig(ratio="sequence", epsilon=0.5),
    "sft, a constant": ObjectiveConfig(name="sft", denominator="constant", constant=77.0),
}
ON_POLICY = {
    "nft, dr_grpo": ObjectiveConfig(name="nft", omega="dr_grpo"),
    "dr_grpo": ObjectiveConfig(name="dr_grpo"),
    "nft, grpo": ObjectiveConfig(name="nft", omega="grpo"),
    "grpo": ObjectiveConfig(name="grpo"),
}
PLAIN = {"distributed_optimizer": False}
LAYOUTS = {  # by the number of processes
    1: {"TP1": {}, "TP1, plain optimizer": PLAIN},
    2: {
        "TP2": {"tensor": 2},
        "TP2·SP": {"tensor": 2, "sequence": True},
        "PP2": {"pipeline": 2},
        "PP2, plain optimizer": {"pipeline": 2} | PLAIN,
        "PP2·VPP2": {"pipeline": 2, "virtual_pipeline": 2},
        "CP2": {"context": 2},
        "DP2": {},
        "DP2, plain optimizer": PLAIN,
    },
    4: {
        "TP2·PP2": {"tensor": 2, "pipeline": 2},
        "TP2·SP·PP2·VPP2": {
            "tensor": 2,
            "sequence": True,
            "pipeline": 2,
            "virtual_pipeline": 2,
        },
        "TP2·SP·PP2": {"tensor": 2, "sequence": True, "pipeline": 2},
        "PP4": {"pipeline": 4},
        "PP4·VPP2": {"pipeline": 4, "virtual_pipeline": 2},
        "PP2·VPP4·CP2": {"pipeline": 2, "virtual_pipeline": 4, "context": 2},
        "TP2·DP2": {"tensor": 2},
        "PP2·DP2": {"pipeline": 2},
        "PP2·VPP2·DP2": {"pipeline": 2, "virtual_pipeline": 2},
        "TP2·CP2": {"tensor": 2, "context": 2},
        "TP2·SP·CP2": {"tensor": 2, "sequence": True, "context": 2},
        "CP2·PP2": {"context": 2, "pipeline": 2},
        "CP2·PP2·VPP2": {"context": 2, "pipeline": 2, "virtual_pipeline": 2},
        "CP4": {"context": 4},
        "CP2·DP2": {"context": 2},
        "TP2·PP2, plain optimizer": {"tensor": 2, "pipeline": 2} | PLAIN,
        "CP2·DP2, plain optimizer": {"context": 2} | PLAIN,
    },
}
MAX_PROCESSES = torch.cuda.device_count() or 4  # on a CUDA host each has a GPU


def _params(max_processes: int) -> list[Any]:
    """Layouts of so many processes at most; those that this host has too few GPUs for, skipped."""
    return [
        pytest.param(name, marks=[pytest.mark.skip(f"needs {num} GPUs")] * (num > MAX_PROCESSES))
        for num, layouts in LAYOUTS.items()
        for name in layouts
        if num <= max_processes
    ]


NAMES, SMALL = _params(4), _params(2)
MICRO_BATCHES = (1, 2, 5)
Models = dict[int, list[Path]]  # by their layers: one with a head of its own, one that is tied
WIDE = 0  # and a tied one whose every parameter fills whole blocks of 128 elements


def _budget(num_micro_batches: int) -> int:
    """The least token budget with which one rank needs no more micro-batches than that."""
    budgets = range(max(LENGTHS), sum(LENGTHS) + 1)
    return next(b for b in budgets if len(deal(LENGTHS, 1, b)[0]) <= num_micro_batches)


VARIANTS = {
    **{f"{n} micro-batches": Variant(_budget(n)) for n in MICRO_BATCHES},
    "each sequence alone": Variant(1),
    "each row padded to the longest": Variant(1, row_multiple=-(-max(LENGTHS) // 16) * 16),
    "packed rows padded to a multiple": Variant(row_multiple=48),
    "whole layers recomputed": Variant(memory=MemoryConfig(recompute="full")),
    "attention recomputed": Variant(
        memory=MemoryConfig(recompute="selective", recompute_modules=["core_attn"])
    ),
    "MLPs recomputed": Variant(memory=MemoryConfig(recompute="selective")),
    "attention and MLPs recomputed": Variant(
        memory=MemoryConfig(recompute="selective", recompute_modules=["core_attn", "mlp"])
    ),
}
IN_EVERY_LAYOUT = (  # the others in those of one and two processes alone, to save minutes
    "1 micro-batches",
    "5 micro-batches",
    "each row padded to the longest",
    "whole layers recomputed",
)

WEIGHTED = (  # tokens' losses, by variant and objective
    ("1 micro-batches", "nft"),
    ("each sequence alone", "nft"),
    ("5 micro-batches", "nft, ratios of sequences"),  # no gradient is promised
)


# what the processes do


def _on_policy_gradients(path: Path, layout: ParallelConfig) -> dict[str, Tensors]:
    return {
        name: gradient(path, objective, layout, _groups(), on_policy=True)
        for name, objective in ON_POLICY.items()
    }


def _groups() -> list[Sequence]:
    """Four questions with six answers each, of which 1, 2, 3 and 5 are right."""
    sequences = random_sequences(24, seed=1)
    return [
        replace(
            sequences[6 * group + i],
            prompt=sequences[6 * group].prompt,
            correct=i < num_correct,
            group_accuracy=num_correct / 6,
        )
        for group, num_correct in enumerate([1, 2, 3, 5])
        for i in range(6)
    ]


def _step_that_is_not_finite(path: Path, layout: ParallelConfig, field: str) -> dict[str, Any]:
    """What a NaN in a sequence's `field` raises and leaves behind, and the step after."""
    policy = policy_of(configured(path, NFT, layout))
    *good, last = SEQUENCES
    bad = [*good, replace(last, **{field: getattr(last, field) * np.nan})]
    before = weights_of(policy)
    folder = path.parent / f"skipped-{field}-{'-'.join(map(str, astuple(layout)))}"
    updates = Updates(policy, folder if torch.distributed.get_rank() == 0 else None, 1)
    first, error = updates.step(1, bad, LR), ""
    try:
        updates.step(2, bad, LR)
    except FloatingPointError as raised:
        error = str(raised)
    untouched = all(np.array_equal(w, before[n]) for n, w in weights_of(policy).items())
    metrics = updates.step(3, SEQUENCES, LR)
    return {
        "first": first,
        "error": error,
        "num_skipped": updates.skipped.total,
        "files": sorted(folder.iterdir()) if folder.exists() else [],
        "untouched": untouched,
        "weights": weights_of(policy),
        **metrics,
    }


def _in_bfloat16(path: Path, layout: ParallelConfig) -> dict[str, Any]:
    """Log-probabilities and loss in bf16, and the dtypes that the step works in.

    Gradients and optimizer are away while the log-probabilities are computed.
    """
    policy = policy_of(configured(path, NFT, layout, MemoryConfig(offload=True), dtype="bfloat16"))
    before, logp = weights_of(policy), logp_on_lent_memory(policy, SEQUENCES)
    metrics = policy.update(SEQUENCES, LR)
    parameters = [p for chunk in policy.chunks for p in chunk.parameters()]
    return {
        "logp": logp,
        "before": before,
        "weights": weights_of(policy),
        "parameters": {str(p.dtype) for p in parameters},
        "gradients": {str(p.main_grad.dtype) for p in parameters},
        **metrics,
    }


def _refusal_to_save(path: Path, layout: ParallelConfig) -> str:
    from megatron_nft.policy import checkpoint

    try:
        checkpoint.check(policy_of(configured(path, NFT, layout)))
    except ValueError as error:
        return str(error)
    return ""


def _everywhere(path: Path, layout: ParallelConfig, variants: Iterable[str]) -> dict[str, Any]:
    return {
        "variants": {
            name: gradient(path, NFT, layout, SEQUENCES, VARIANTS[name]) for name in variants
        },
        "one sequence": gradient(path, NFT, layout, random_sequences(1)),
    }


def _in_small_layouts(path: Path, layout: ParallelConfig) -> dict[str, Any]:
    return {
        "on policy": _on_policy_gradients(path, layout),
        "not finite": {
            field: _step_that_is_not_finite(path, layout, field)
            for field in ("group_accuracy", "old_logp")
        },
        "bfloat16": _in_bfloat16(path, layout),
        "weighted": {
            (name, objective): gradient(
                path, OBJECTIVES[objective], layout, weighted(SEQUENCES), VARIANTS[name]
            )
            for name, objective in WEIGHTED
        },
        "at temperature 2": policy_of(configured(path, NFT, layout)).logp(SEQUENCES, 2.0),
    }


def everything(
    models: Models, layouts: list[ParallelConfig], only_steps: bool = False
) -> list[dict[str, Any]]:
    """For each layout what the tests below compare, or only what plain torch is compared to."""
    from megatron_nft.policy import parallel

    results = []
    parallel.initialize(ParallelConfig(), seed=0)
    is_small = torch.distributed.get_world_size() < 4
    for layout in layouts:
        parallel.lay_groups(layout, seed=0)
        paths = models[num_layers(layout)]
        found = _everywhere(paths[0], layout, VARIANTS if is_small else IN_EVERY_LAYOUT)
        found["steps"] = [
            {
                name: step(policy_of(configured(path, objective, layout)), SEQUENCES)
                for name, objective in OBJECTIVES.items()
            }
            for path in paths
        ]
        if is_small and not only_steps:
            found |= _in_small_layouts(paths[0], layout)
            found["resumed"] = [
                through_and_resumed(path, NFT, layout, SEQUENCES)
                for path in (paths[0], models[WIDE][0])
            ]
            found["not saved"] = _refusal_to_save(paths[1], layout)
        results.append(found)
    parallel.finalize()
    return results


# what the tests compare


def save_models(folder: Path) -> Models:
    wide = save_qwen2(folder / "wide", tied=True, num_hidden_layers=4, hidden_size=128)
    return {WIDE: [wide]} | {
        num_layers: [
            save_qwen2(folder / f"{num_layers}-{tied}", tied=tied, num_hidden_layers=num_layers)
            for tied in (False, True)
        ]
        for num_layers in (4, 8)
    }


def models_of(layout: str, models: Models) -> list[Path]:
    """The shallower ones, unless they have too few layers for the stages."""
    [options] = [layouts[layout] for layouts in LAYOUTS.values() if layout in layouts]
    return models[num_layers(ParallelConfig(**options))]


def num_layers(layout: ParallelConfig) -> int:
    return max(4, layout.pipeline * layout.virtual_pipeline)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def ours(models: Models) -> dict[str, dict[str, Any]]:
    found = {}
    for num_processes, layouts in LAYOUTS.items():
        if num_processes > MAX_PROCESSES:
            continue
        configs = [ParallelConfig(**options) for options in layouts.values()]
        results = run(everything, num_processes, models, configs)[0]
        found |= dict(zip(layouts, results, strict=True))
    return found


def _compare(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    """Loss, gradient norm and every updated weight, to 1e-5."""
    assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6)
    assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert ours["weights"].keys() == expected["weights"].keys()
    for name, weight in ours["weights"].items():
        assert distance({name: weight}, {name: expected["weights"][name]}) <= 1e-5, name


@pytest.mark.processes
@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("tied", [False, True])
def test_one_step_equals_plain_torch(
    models: Models, ours: dict[str, Any], tied: bool, objective: str, layout: str
) -> None:
    step = ours[layout]["steps"][tied][objective]
    expected = reference(models_of(layout, models)[tied], OBJECTIVES[objective])
    for a, b in zip(step["logp"], expected["logp"], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for a, b, s in zip(step["log_ratio"], expected["logp"], SEQUENCES, strict=True):
        np.testing.assert_allclose(a, b - s.old_logp, atol=1e-5)
    _compare(step, expected)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("layout", "variant"),
    [
        pytest.param(*layout.values, v, marks=layout.marks)
        for layout in NAMES
        for v in VARIANTS
        if layout in SMALL or v in IN_EVERY_LAYOUT
    ],
)
def test_gradient_depends_on_nothing_but_the_sequences(
    models: Models, ours: dict[str, Any], variant: str, layout: str
) -> None:
    expected = reference(models_of(layout, models)[0], NFT)["gradient"]
    assert worst(ours[layout]["variants"][variant], expected) <= 1e-5


@pytest.mark.parametrize("num", MICRO_BATCHES)
def test_a_budget_makes_the_micro_batches_that_its_name_says(num: int) -> None:
    assert len(deal(LENGTHS, 1, VARIANTS[f"{num} micro-batches"].budget)[0]) == num


@pytest.mark.processes
@pytest.mark.parametrize("layout", NAMES)
def test_a_rank_without_a_sequence_changes_nothing(
    models: Models, ours: dict[str, Any], layout: str
) -> None:
    expected = reference(models_of(layout, models)[0], NFT, num_sequences=1)["gradient"]
    assert worst(ours[layout]["one sequence"], expected) <= 1e-5


@pytest.mark.processes
@pytest.mark.parametrize("layout", SMALL)
@pytest.mark.parametrize(("variant", "objective"), WEIGHTED)
def test_tokens_are_weighted_and_the_denominator_is_not(
    models: Models, ours: dict[str, Any], variant: str, objective: str, layout: str
) -> None:
    path = models_of(layout, models)[0]
    expected = reference(path, OBJECTIVES[objective], is_weighted=True)["gradient"]
    assert worst(ours[layout]["weighted"][variant, objective], expected) <= 1e-5
    # it could fail; one sequence, hardly weighted, makes most of the gradient of sequence ratios
    assert worst(reference(path, OBJECTIVES[objective])["gradient"], expected) > 1e-2


@pytest.mark.processes
@pytest.mark.parametrize("layout", SMALL)
def test_logp_at_another_temperature(models: Models, ours: dict[str, Any], layout: str) -> None:
    expected = reference_logp(models_of(layout, models)[0], temperature=2.0)
    for a, b in zip(ours[layout]["at temperature 2"], expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.processes
@pytest.mark.parametrize("layout", SMALL)
def test_on_policy_nft_is_dr_grpo_or_grpo(ours: dict[str, Any], layout: str) -> None:
    gradients = ours[layout]["on policy"]
    assert distance(gradients["nft, dr_grpo"], gradients["dr_grpo"]) <= 1e-5
    # but for the 1e-6 that GRPO adds to the standard deviation
    assert distance(gradients["nft, grpo"], gradients["grpo"]) <= 1e-4
    assert distance(gradients["dr_grpo"], gradients["grpo"]) > 0.1  # it could have failed


@pytest.mark.processes
@pytest.mark.parametrize("layout", SMALL)
@pytest.mark.parametrize("field", ["group_accuracy", "old_logp"])
def test_a_step_that_is_not_finite_is_refused_and_forgotten(
    models: Models, ours: dict[str, Any], field: str, layout: str
) -> None:
    """Row 14 of field_failures: it never reaches the weights, and its batch can be looked at."""
    result = ours[layout]["not finite"][field]
    assert result["first"] is None
    assert result["num_skipped"] == 2
    assert "2 steps in a row were not finite" in result["error"]
    assert "nan" in result["error"]
    assert result["untouched"]
    assert [file.name for file in result["files"]] == ["step_1.parquet", "step_2.parquet"]
    rows = pq.read_table(result["files"][0]).to_pylist()
    assert [row["response"] for row in rows] == [s.response.tolist() for s in SEQUENCES]
    assert np.isnan(rows[-1][field]).all()
    _compare(result, reference(models_of(layout, models)[0], NFT))


@pytest.mark.processes
@pytest.mark.parametrize("layout", SMALL)
def test_bfloat16_parameters_have_float32_gradients(
    models: Models, ours: dict[str, Any], layout: str
) -> None:
    result = ours[layout]["bfloat16"]
    assert result["parameters"] == {str(torch.bfloat16)}
    assert result["gradients"] == {str(torch.float32)}
    exact = reference(models_of(layout, models)[0], NFT)
    logp, rounded = bfloat16_noise(models_of(layout, models)[0])
    ours, theirs = (
        np.square(x - logp).mean() ** 0.5 for x in (np.concatenate(result["logp"]), rounded)
    )
    assert ours <= 1.25 * theirs, "it rounds more than transformers does"
    assert result["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.05)
    off = distance(result["weights"], exact["weights"])
    assert off <= 2**-8  # half a unit in the last place
    assert off <= 0.5 * distance(result["before"], exact["weights"])  # it went there


@pytest.mark.processes
@pytest.mark.parametrize("layout", SMALL)
def test_a_checkpoint_holds_all_that_the_next_step_needs(ours: dict[str, Any], layout: str) -> None:
    for through, resumed in ours[layout]["resumed"]:  # untied, and tied and wide
        assert through.keys() == resumed.keys()
        assert all(np.array_equal(through[n], resumed[n]) for n in through)


@pytest.mark.processes
@pytest.mark.parametrize("layout", SMALL)
def test_a_checkpoint_that_megatron_would_get_wrong_is_refused(
    ours: dict[str, Any], layout: str
) -> None:
    """A tied embedding of 67 · 32 elements has a padded bucket of its own on the last stage."""
    has_buckets = layout in ("PP2", "PP2·VPP2")
    assert ("parallel.distributed_optimizer=false" in ours[layout]["not saved"]) == has_buckets
