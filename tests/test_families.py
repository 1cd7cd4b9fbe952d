"""Every family in every kind of layout against transformers' model, in plain PyTorch.

As in test_step.py, each launch of processes takes all the steps, and the tests compare.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
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
from reference import LR, distance, reference, worst
from safetensors.torch import load_file
from toys import LLAMA3_ROPE, random_sequences, save_model

from megatron_nft.config import MemoryConfig, ObjectiveConfig, ParallelConfig

SEQUENCES = random_sequences(13)
NFT = ObjectiveConfig(name="nft")
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}
DENSE = {  # by name: model type, whether tied, options
    "Qwen2": ("qwen2", False, {}),
    "Qwen2, tied": ("qwen2", True, {}),
    "Qwen3": ("qwen3", False, THETA),
    "Qwen3, tied": ("qwen3", True, {}),
    "Llama": ("llama", False, THETA),
    "Llama, linear rope": ("llama", False, LINEAR),
    "Llama 3.1": ("llama", False, {"rope_parameters": LLAMA3_ROPE}),
    "Llama 3.1, tied": ("llama", True, {"rope_parameters": LLAMA3_ROPE}),
    "Mistral": ("mistral", False, {"head_dim": 16}),
}
EXPERTS = {
    "Qwen3-MoE": ("qwen3_moe", False, {"norm_topk_prob": True}),
    "Qwen3-MoE, not normalized": ("qwen3_moe", False, {"norm_topk_prob": False}),
    "Qwen3-MoE, tied": ("qwen3_moe", True, {"norm_topk_prob": True}),
    "Mixtral": ("mixtral", False, {}),
}
MODELS = DENSE | EXPERTS
PLAIN = {"distributed_optimizer": False}
SP = {"tensor": 2, "sequence": True}
LAYOUTS = {  # by the number of processes: of all models, of the dense ones, of those with experts
    1: ({"TP1": {}}, {}, {"TP1, plain optimizer": PLAIN}),
    2: (
        {"TP2·SP": SP, "PP2": {"pipeline": 2}},
        {"TP2": {"tensor": 2}},
        {
            "DP2": {},
            "EP2": {"expert": 2},
            "EP2, plain optimizer": {"expert": 2} | PLAIN,
            "TP2·SP·EP2": SP | {"expert": 2},
            "CP2·EP2": {"context": 2, "expert": 2},
        },
    ),
    4: (
        {},
        {"TP2·PP2": {"tensor": 2, "pipeline": 2}},
        {
            "EP2·DP2": {"expert": 2},
            "TP2·SP·EP4": SP | {"expert": 4},
            "TP2·SP·EP2·PP2": SP | {"expert": 2, "pipeline": 2},
        },
    ),
}
VARIANTS = {
    "each sequence alone": Variant(1),
    "packed rows padded to a multiple": Variant(row_multiple=48),
    "whole layers recomputed": Variant(memory=MemoryConfig(recompute="full")),
    "experts recomputed": Variant(memory=MemoryConfig(recompute="selective")),
}
CASES = [
    (model, layout)
    for of_all, of_dense, of_experts in LAYOUTS.values()
    for models, layouts in ((DENSE, of_all | of_dense), (EXPERTS, of_all | of_experts))
    for model in models
    for layout in layouts
]
Found = dict[tuple[str, str], dict[str, Any]]  # by model and layout
VARIED = "Qwen3-MoE"  # looked at more closely in these layouts
CLOSELY = ("TP1", "EP2", "EP2, plain optimizer", "TP2·SP·EP2")


# what the processes do


def _everything(
    cases: list[tuple[str, str]], layouts: dict[str, dict[str, Any]], models: dict[str, Path]
) -> Found:
    from megatron_nft.policy import parallel

    found = {}
    parallel.initialize(ParallelConfig(), seed=0)
    for name, options in layouts.items():
        layout = ParallelConfig(**options)
        parallel.lay_groups(layout, seed=0)
        for model in (model for model, where in cases if where == name):
            found[model, name] = _look_at(models[model], layout)
        if (VARIED, name) in cases and name in CLOSELY:
            found[VARIED, name] |= _look_closely(models[VARIED], layout)
    parallel.finalize()
    return found


def _look_at(path: Path, layout: ParallelConfig) -> dict[str, Any]:
    policy = policy_of(configured(path, NFT, layout))
    return {
        "streamed": weights_of(policy),
        **step(policy, SEQUENCES),
        "gradient": gradient(path, NFT, layout, SEQUENCES),
    }


def _look_closely(path: Path, layout: ParallelConfig) -> dict[str, Any]:
    """Other ways to the same gradient, bf16, and a checkpoint; gradients and optimizer are away
    while bf16's log-probabilities are computed.
    """
    offload = MemoryConfig(offload=True)
    policy = policy_of(configured(path, NFT, layout, offload, dtype="bfloat16"))
    return {
        "bfloat16": {
            "logp": logp_on_lent_memory(policy, SEQUENCES),
            **policy.update(SEQUENCES, LR),
        },
        "variants": {
            name: gradient(path, NFT, layout, SEQUENCES, variant)
            for name, variant in VARIANTS.items()
        },
        "one sequence": gradient(path, NFT, layout, random_sequences(1)),
        "resumed": through_and_resumed(path, NFT, layout, SEQUENCES),
    }


# what the tests compare


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: save_model(folder / str(number), model_type, tied=tied, **changes)
        for number, (name, (model_type, tied, changes)) in enumerate(MODELS.items())
    }


@pytest.fixture(scope="module")
def ours(models: dict[str, Path]) -> Found:
    found = {}
    for num_processes, parts in LAYOUTS.items():
        layouts = {name: options for part in parts for name, options in part.items()}
        found |= run(_everything, num_processes, CASES, layouts, models)[0]
    return found


@pytest.mark.processes
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_log_probabilities_are_those_of_transformers(
    models: dict[str, Path], ours: Found, model: str, layout: str
) -> None:
    expected = reference(models[model], NFT)["logp"]
    for a, b in zip(ours[model, layout]["logp"], expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.processes
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_the_stream_is_the_files_bit_for_bit(
    models: dict[str, Path], ours: Found, model: str, layout: str
) -> None:
    streamed = ours[model, layout]["streamed"]
    expected = load_file(models[model] / "model.safetensors")
    assert streamed.keys() == expected.keys()
    assert all(np.array_equal(streamed[n], t.numpy()) for n, t in expected.items())


@pytest.mark.processes
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_a_step_is_that_of_plain_torch(
    models: dict[str, Path], ours: Found, model: str, layout: str
) -> None:
    found, expected = ours[model, layout], reference(models[model], NFT)
    assert worst(found["gradient"], expected["gradient"]) <= 1e-5
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in found["weights"].items():
        assert distance({name: weight}, {name: expected["weights"][name]}) <= 1e-5, name


@pytest.mark.processes
@pytest.mark.parametrize("layout", CLOSELY)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_depends_on_nothing_but_the_sequences(
    models: dict[str, Path], ours: Found, variant: str, layout: str
) -> None:
    expected = reference(models[VARIED], NFT)["gradient"]
    assert worst(ours[VARIED, layout]["variants"][variant], expected) <= 1e-5


@pytest.mark.processes
@pytest.mark.parametrize("layout", CLOSELY)
def test_a_rank_without_a_sequence_takes_part_in_the_dispatch(
    models: dict[str, Path], ours: Found, layout: str
) -> None:
    expected = reference(models[VARIED], NFT, num_sequences=1)["gradient"]
    assert worst(ours[VARIED, layout]["one sequence"], expected) <= 1e-5


@pytest.mark.processes
@pytest.mark.parametrize("layout", CLOSELY)
def test_experts_in_bfloat16(models: dict[str, Path], ours: Found, layout: str) -> None:
    found, exact = ours[VARIED, layout]["bfloat16"], reference(models[VARIED], NFT)
    deltas = [a - b for a, b in zip(found["logp"], exact["logp"], strict=True)]
    assert np.abs(np.concatenate(deltas)).max() <= 0.1
    assert found["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.05)


@pytest.mark.processes
@pytest.mark.parametrize("layout", CLOSELY)
def test_a_checkpoint_holds_all_experts(ours: Found, layout: str) -> None:
    through, resumed = ours[VARIED, layout]["resumed"]
    assert through.keys() == resumed.keys()
    assert all(np.array_equal(through[n], resumed[n]) for n in through)
