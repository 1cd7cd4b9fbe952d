"""Whole optimizer steps against plain PyTorch, the Hugging Face model and each other.

Processes cost far more than steps: two launches, of one and of two processes, take all the steps
of this file, and the tests compare what came back.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import run
from toys import random_sequences, save_qwen2
from transformers import AutoModelForCausalLM

from megatron_nft.config import (
    Config,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
)
from megatron_nft.policy.packing import Sequence

TEMPERATURE = 1.0
LR = 1e-3
EPS = 1e-6  # with 1e-8 the first step of Adam is the sign of gradients that are rounding alone
STEPS = [
    ObjectiveConfig(name="nft"),
    ObjectiveConfig(name="nft", omega="uniform", denominator="sequence_mean"),
    ObjectiveConfig(name="sft", denominator="constant", constant=77.0),
]
ON_POLICY = {
    "nft, dr_grpo": ObjectiveConfig(name="nft", omega="dr_grpo"),
    "dr_grpo": ObjectiveConfig(name="dr_grpo"),
    "nft, grpo": ObjectiveConfig(name="nft", omega="grpo"),
    "grpo": ObjectiveConfig(name="grpo"),
}
BUDGETS = [1, 64, 150, 100_000]  # tokens a micro-batch: one sequence each … all of them together
ALONE = {
    "TP1": ParallelConfig(),
    "TP1, plain optimizer": ParallelConfig(distributed_optimizer=False),
}
TOGETHER = {
    "TP2": ParallelConfig(tensor=2),
    "TP2 with sequence parallelism": ParallelConfig(tensor=2, sequence=True),
    "DP2": ParallelConfig(),
    "DP2, plain optimizer": ParallelConfig(distributed_optimizer=False),
}
LAYOUTS = [*ALONE, *TOGETHER]
Gradient = dict[str, np.ndarray]  # by the Hugging Face name of the parameter


def _config(
    path: Path, objective: ObjectiveConfig, layout: ParallelConfig, **optimizer: Any
) -> Config:
    options = {"lr": LR, "tokens_per_microbatch": 64, "clip_norm": 0.5, "eps": EPS} | optimizer
    return Config(
        model=ModelConfig(path=str(path), dtype="float32"),
        parallel=layout,
        objective=objective,
        optimizer=OptimizerConfig(**options),
    )


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


def _ours(paths: list[Path], layouts: list[ParallelConfig]) -> list[dict[str, Any]]:
    """For each layout what the tests below compare; the first path's model has a head."""
    from megatron_nft.policy import parallel

    results = []
    parallel.initialize(ParallelConfig(), seed=0)
    for layout in layouts:
        parallel.lay_groups(layout, seed=0)
        results.append(
            {
                "steps": [[_step(path, o, layout) for o in STEPS] for path in paths],
                "on policy": _on_policy_gradients(paths[0], layout),
                "budgets": [
                    _gradient(paths[0], STEPS[0], layout, random_sequences(13), budget)
                    for budget in BUDGETS
                ],
                "one sequence": _gradient(paths[0], STEPS[0], layout, random_sequences(1)),
                "not finite": {
                    field: _step_that_is_not_finite(paths[0], layout, field)
                    for field in ("group_accuracy", "old_logp")
                },
            }
        )
    parallel.finalize()
    return results


def _policy(config: Config) -> Any:
    from checkpoints_conversion.hf_files import read_hf_config
    from megatron_nft.policy.step import Policy

    return Policy(config, read_hf_config(Path(config.model.path)))


def _weights(policy: Any) -> dict[str, np.ndarray]:
    from checkpoints_conversion.stream import stream

    return {n: t.numpy().copy() for n, t in stream(policy.model, policy.hf_config)}


def _step(path: Path, objective: ObjectiveConfig, layout: ParallelConfig) -> dict[str, Any]:
    """Log-probabilities, then loss, gradient norm and weights after one step of AdamW."""
    policy = _policy(_config(path, objective, layout))
    sequences = random_sequences(13)
    logp = policy.logp(sequences)
    metrics = policy.update(sequences, LR)
    return {"logp": logp, "weights": _weights(policy), **metrics}


def _gradient(
    path: Path,
    objective: ObjectiveConfig,
    layout: ParallelConfig,
    sequences: list[Sequence],
    tokens_per_microbatch: int = 64,
    on_policy: bool = False,
) -> Gradient:
    """The gradient that the whole step follows, read off the weights.

    With an ε far above every gradient, Adam's step is −lr/ε times the gradient; lr/ε is so large
    that the step does not drown in the rounding of the weight.
    """
    eps, scale = 1e8, 1e4
    options = {"eps": eps, "weight_decay": 0.0, "clip_norm": 1e9}
    policy = _policy(
        _config(path, objective, layout, tokens_per_microbatch=tokens_per_microbatch, **options)
    )
    if on_policy:
        logp = policy.logp(sequences)
        sequences = [replace(s, old_logp=p) for s, p in zip(sequences, logp, strict=True)]
    before = _weights(policy)
    metrics = policy.update(sequences, lr=eps * scale)
    if on_policy:
        assert abs(metrics["ratio"] - 1).max() < 1e-5
    return {n: (before[n] - w) / scale for n, w in _weights(policy).items()}


def _on_policy_gradients(path: Path, layout: ParallelConfig) -> dict[str, Gradient]:
    return {
        name: _gradient(path, objective, layout, _groups(), on_policy=True)
        for name, objective in ON_POLICY.items()
    }


def _step_that_is_not_finite(path: Path, layout: ParallelConfig, field: str) -> dict[str, Any]:
    """What a NaN in a sequence's `field` raises and leaves behind, and the step after."""
    policy = _policy(_config(path, STEPS[0], layout))
    good = random_sequences(13)
    bad = [*good[:-1], replace(good[-1], **{field: getattr(good[-1], field) * np.nan})]
    before = _weights(policy)
    error = ""
    try:
        policy.update(bad, LR)
    except FloatingPointError as raised:
        error = str(raised)
    untouched = all(np.array_equal(w, before[n]) for n, w in _weights(policy).items())
    metrics = policy.update(good, LR)
    return {"error": error, "untouched": untouched, "weights": _weights(policy), **metrics}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save_qwen2(folder / "untied"), save_qwen2(folder / "tied", tied=True)]


@pytest.fixture(scope="module")
def ours(models: list[Path]) -> dict[str, dict[str, Any]]:
    alone = run(_ours, 1, models, list(ALONE.values()))[0]
    together = run(_ours, 2, models, list(TOGETHER.values()))[0]
    return dict(zip(LAYOUTS, alone + together, strict=True))


def _hf_logp(model: torch.nn.Module, s: Sequence) -> torch.Tensor:
    tokens = torch.from_numpy(np.concatenate([s.prompt, s.response]).astype(np.int64))
    logits = model(tokens[None]).logits[0, len(s.prompt) - 1 : -1]
    return (logits / TEMPERATURE).log_softmax(-1).gather(1, tokens[len(s.prompt) :, None])[:, 0]


def _nft_loss(logp: torch.Tensor, s: Sequence, omega: str) -> torch.Tensor:
    """nft.md's loss, by its formula, for one sequence's tokens."""
    accuracy = min(max(s.group_accuracy, 0.02), 0.98)
    ratio = torch.exp(logp - torch.from_numpy(s.old_logp))
    weight = {"dr_grpo": 1 - accuracy, "uniform": 1.0}[omega]
    if s.correct:
        return -weight * torch.log(ratio)
    implicit = (1 - accuracy * ratio) / (1 - accuracy)
    clipped = implicit + (implicit.clamp(min=1.0) - implicit).detach()
    return -weight * torch.log(clipped)


@cache
def _reference(path: Path, objective: ObjectiveConfig, num_sequences: int = 13) -> dict[str, Any]:
    sequences = random_sequences(num_sequences)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(0.9, 0.999), eps=EPS, weight_decay=0.1
    )
    logp = [_hf_logp(model, s) for s in sequences]
    if objective.name == "nft":
        losses = [_nft_loss(p, s, objective.omega) for p, s in zip(logp, sequences, strict=True)]
    else:
        losses = [-p for p in logp]
    loss = {
        "token_mean": lambda: torch.cat(losses).mean(),
        "sequence_mean": lambda: torch.stack([x.mean() for x in losses]).mean(),
        "constant": lambda: torch.cat(losses).sum() / objective.constant,
    }[objective.denominator]()
    loss.backward()
    gradient = {n: p.grad.numpy().copy() for n, p in model.named_parameters()}
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return {
        "logp": [p.detach().numpy() for p in logp],
        "loss": float(loss.detach()),
        "gradient": gradient,
        "grad_norm": float(grad_norm),
        "weights": {n: p.detach().numpy() for n, p in model.named_parameters()},
    }


def _compare(ours: dict[str, Any], reference: dict[str, Any]) -> None:
    assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-5, abs=1e-6)
    assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
    assert ours["weights"].keys() == reference["weights"].keys()
    for name, weight in ours["weights"].items():
        expected = reference["weights"][name]
        np.testing.assert_allclose(weight, expected, atol=1e-5, rtol=1e-5, err_msg=name)


def _distance(a: Gradient, b: Gradient) -> float:
    """‖a − b‖ / ‖b‖ over all parameters."""
    assert a.keys() == b.keys()
    difference = sum(float(((a[n].astype(np.float64) - b[n]) ** 2).sum()) for n in b)
    return (difference / sum(float((b[n].astype(np.float64) ** 2).sum()) for n in b)) ** 0.5


@pytest.mark.processes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_one_step_equals_plain_torch(
    models: list[Path], ours: dict[str, dict[str, Any]], tied: bool, layout: str
) -> None:
    for objective, step in zip(STEPS, ours[layout]["steps"][tied], strict=True):
        reference = _reference(models[tied], objective)
        for a, b in zip(step["logp"], reference["logp"], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
        _compare(step, reference)


@pytest.mark.processes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_depends_on_neither_micro_batches_nor_layout(
    models: list[Path], ours: dict[str, dict[str, Any]], layout: str
) -> None:
    expected = _reference(models[0], STEPS[0])["gradient"]
    for gradient in ours[layout]["budgets"]:
        assert _distance(gradient, expected) <= 1e-5


@pytest.mark.processes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_without_a_sequence_changes_nothing(
    models: list[Path], ours: dict[str, dict[str, Any]], layout: str
) -> None:
    expected = _reference(models[0], STEPS[0], num_sequences=1)["gradient"]
    assert _distance(ours[layout]["one sequence"], expected) <= 1e-5


@pytest.mark.processes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_policy_nft_is_dr_grpo_or_grpo(ours: dict[str, dict[str, Any]], layout: str) -> None:
    gradients = ours[layout]["on policy"]
    assert _distance(gradients["nft, dr_grpo"], gradients["dr_grpo"]) <= 1e-5
    # but for the 1e-6 that GRPO adds to the standard deviation
    assert _distance(gradients["nft, grpo"], gradients["grpo"]) <= 1e-4
    assert _distance(gradients["dr_grpo"], gradients["grpo"]) > 0.1  # it could have failed


@pytest.mark.processes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "field",
    [
        "group_accuracy",
        "old_logp",
    ],
)
def test_a_step_that_is_not_finite_is_refused_and_forgotten(
    models: list[Path], ours: dict[str, dict[str, Any]], field: str, layout: str
) -> None:
    result = ours[layout]["not finite"][field]
    assert "nan" in result["error"]
    assert result["untouched"]
    _compare(result, _reference(models[0], STEPS[0]))
