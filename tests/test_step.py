"""One whole optimizer step against plain PyTorch and the Hugging Face model."""

from pathlib import Path

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


def _config(path: Path, objective: ObjectiveConfig, tensor: int) -> Config:
    return Config(
        model=ModelConfig(path=str(path), dtype="float32"),
        parallel=ParallelConfig(tensor=tensor),
        objective=objective,
        optimizer=OptimizerConfig(lr=LR, tokens_per_microbatch=64, clip_norm=0.5, eps=EPS),
    )


def _ours(
    path: Path, sequences: list[Sequence], layouts: list[int], objectives: list[ObjectiveConfig]
) -> list[dict]:
    """Loss, gradient norm, weights and log-probabilities for each layout and objective."""
    from checkpoints_conversion.hf_files import read_hf_config
    from checkpoints_conversion.stream import stream
    from megatron_nft.policy import parallel
    from megatron_nft.policy.step import Policy

    results = []
    parallel.initialize(ParallelConfig(), seed=0)
    for tensor in layouts:
        parallel.lay_groups(ParallelConfig(tensor=tensor), seed=0)
        for objective in objectives:
            policy = Policy(_config(path, objective, tensor), read_hf_config(path))
            logp, entropy = policy.logp(sequences)
            metrics = policy.update(sequences, LR)
            weights = {n: t.numpy().copy() for n, t in stream(policy.model, policy.hf_config)}
            results.append({"logp": logp, "entropy": entropy, "weights": weights, **metrics})
    parallel.finalize()
    return results


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


def _reference(path: Path, sequences: list[Sequence], objective: ObjectiveConfig) -> dict:
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
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return {
        "logp": [p.detach().numpy() for p in logp],
        "loss": float(loss.detach()),
        "grad_norm": float(grad_norm),
        "weights": dict(model.named_parameters()),
    }


OBJECTIVES = [
    ObjectiveConfig(name="nft"),
    ObjectiveConfig(name="nft", omega="uniform", denominator="sequence_mean"),
    ObjectiveConfig(name="sft", denominator="constant", constant=77.0),
]


def _compare(ours: dict, reference: dict) -> None:
    for a, b in zip(ours["logp"], reference["logp"], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-5, abs=1e-6)
    assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
    for name, weight in ours["weights"].items():
        expected = reference["weights"][name].detach().numpy()
        np.testing.assert_allclose(weight, expected, atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.processes
@pytest.mark.parametrize("tied", [False, True])
def test_one_step_equals_plain_torch_at_tp1_tp2_dp2(tmp_path: Path, tied: bool) -> None:
    path = save_qwen2(tmp_path / "model", tied=tied)
    sequences = random_sequences(13)
    references = [_reference(path, sequences, o) for o in OBJECTIVES]
    alone = run(_ours, 1, path, sequences, [1], OBJECTIVES)[0]
    together = run(_ours, 2, path, sequences, [2, 1], OBJECTIVES)[0]  # TP2, then DP2
    for ours, reference in zip(alone + together, references * 3, strict=True):
        _compare(ours, reference)
        print(
            abs(ours["loss"] - reference["loss"]),
            abs(ours["grad_norm"] - reference["grad_norm"]),
            max(
                float(np.abs(w - reference["weights"][n].detach().numpy()).max())
                for n, w in ours["weights"].items()
            ),
        )
