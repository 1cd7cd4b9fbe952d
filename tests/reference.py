"""One optimizer step in plain PyTorch: the Hugging Face model and the losses' formulas."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from toys import random_sequences, weighted
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_nft.config import ObjectiveConfig
from megatron_nft.policy.packing import Sequence

LR = 1e-3
EPS = 1e-6  # with 1e-8 the first step of Adam is the sign of gradients that are rounding alone
CLIP_NORM = 0.5
Tensors = dict[str, np.ndarray]  # by the Hugging Face name of the parameter


@cache
def reference(
    path: Path, objective: ObjectiveConfig, num_sequences: int = 13, is_weighted: bool = False
) -> dict[str, Any]:
    """Log-probabilities, loss, gradient and its norm, and the weights after a step of AdamW."""
    sequences = random_sequences(num_sequences)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(0.9, 0.999), eps=EPS, weight_decay=0.1
    )
    logp = [_logp(model, s) for s in sequences]
    losses = [_losses(p, s, objective) for p, s in zip(logp, sequences, strict=True)]
    if is_weighted:
        weights = [torch.from_numpy(s.importance) for s in weighted(sequences)]
        losses = [w * loss for w, loss in zip(weights, losses, strict=True)]
    loss = {
        "token_mean": lambda: torch.cat(losses).mean(),
        "sequence_mean": lambda: torch.stack([x.mean() for x in losses]).mean(),
        "constant": lambda: torch.cat(losses).sum() / objective.constant,
    }[objective.denominator]()
    loss.backward()
    gradient = _as_in_files(model, {n: p.grad for n, p in model.named_parameters()})
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    return {
        "logp": [p.detach().numpy() for p in logp],
        "loss": float(loss.detach()),
        "gradient": gradient,
        "grad_norm": float(grad_norm),
        "weights": _as_in_files(model, dict(model.named_parameters())),
    }


@torch.no_grad()
def reference_logp(path: Path, temperature: float) -> list[np.ndarray]:
    """The sequences' log-probabilities at a temperature."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return [_logp(model, s, temperature).numpy() for s in random_sequences(13)]


@cache
def bfloat16_noise(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of all tokens: those of the weights in bf16, exactly, and transformers' own
    in bf16, from hidden states on in float32.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    rounded = [_logp(model, s) for s in random_sequences(13)]
    exact = [_logp(model.double(), s) for s in random_sequences(13)]
    return tuple(np.concatenate([p.detach().numpy() for p in logp]) for logp in (exact, rounded))


def _as_in_files(model: PreTrainedModel, values: dict[str, torch.Tensor]) -> Tensors:
    """Values of all parameters: transformers has a layer's experts in one, files hold each."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict={n: v.detach() for n, v in values.items()})
        return {n: v.numpy() for n, v in load_file(Path(folder) / "model.safetensors").items()}


def _logp(model: torch.nn.Module, s: Sequence, temperature: float = 1.0) -> torch.Tensor:
    tokens = torch.from_numpy(np.concatenate([s.prompt, s.response]).astype(np.int64))
    hidden = model.model(tokens[None]).last_hidden_state[0, len(s.prompt) - 1 : -1]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(dtype) @ model.lm_head.weight.to(dtype).T / temperature
    return logits.log_softmax(-1).gather(1, tokens[len(s.prompt) :, None])[:, 0]


def _losses(logp: torch.Tensor, s: Sequence, objective: ObjectiveConfig) -> torch.Tensor:
    if objective.name == "sft":
        return -logp
    assert objective.name == "nft"
    return _nft(logp, s, objective)


def _nft(logp: torch.Tensor, s: Sequence, objective: ObjectiveConfig) -> torch.Tensor:
    """nft.md's loss, by its formula, for one sequence's tokens.

    With the product of the ratios in their place every token carries an equal share of the loss.
    """
    accuracy = min(max(s.group_accuracy, 0.02), 0.98)
    log_ratio = logp - torch.from_numpy(s.old_logp)
    if objective.ratio == "sequence":
        log_ratio = log_ratio.sum().clamp(max=10).expand(len(logp))
    share = len(logp) if objective.ratio == "sequence" else 1
    weight = {"dr_grpo": 1 - accuracy, "uniform": 1.0}[objective.omega] / share
    if s.correct:
        return -weight * log_ratio
    implicit = (1 - accuracy * log_ratio.exp()) / (1 - accuracy)
    clipped = implicit + (implicit.clamp(min=objective.epsilon) - implicit).detach()
    return -weight * torch.log(clipped)


def worst(a: Tensors, b: Tensors) -> float:
    """The largest ‖a − b‖ / ‖b‖ of a parameter; one with hardly any norm counts with 1% of all's.

    (The keys' biases have none but rounding: softmax does not see them.)
    """
    least = 0.01 * sum(float((x.astype(np.float64) ** 2).sum()) for x in b.values()) ** 0.5
    assert a.keys() == b.keys()
    return max(
        float(np.linalg.norm(a[n].astype(np.float64) - b[n])) / max(float(np.linalg.norm(x)), least)
        for n, x in b.items()
    )


def distance(a: Tensors, b: Tensors) -> float:
    """‖a − b‖ / ‖b‖ over all parameters."""
    assert a.keys() == b.keys()
    difference = sum(float(((a[n].astype(np.float64) - b[n]) ** 2).sum()) for n in b)
    return (difference / sum(float((b[n].astype(np.float64) ** 2).sum()) for n in b)) ** 0.5
