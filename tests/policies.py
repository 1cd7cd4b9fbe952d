"""Policies of toy models in the processes of a test, and what a step does to their weights.

Gradients are read off the weights: with an ε far above every gradient, Adam's step is −lr/ε times
the gradient.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import CLIP_NORM, EPS, LR, Tensors

from megatron_nft.config import (
    Config,
    MemoryConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
)
from megatron_nft.policy.packing import Sequence


@dataclass(frozen=True)
class Variant:
    """Another way to the same gradient."""

    budget: int = 64
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    row_multiple: int = 1


def configured(
    path: Path,
    objective: ObjectiveConfig,
    layout: ParallelConfig,
    memory: MemoryConfig | None = None,
    dtype: str = "float32",
    **optimizer: Any,
) -> Config:
    """A run's configuration, as plain torch's reference has it."""
    options = {"lr": LR, "tokens_per_microbatch": 64, "clip_norm": CLIP_NORM, "eps": EPS}
    return Config(
        model=ModelConfig(path=str(path), dtype=dtype),
        parallel=layout,
        memory=memory or MemoryConfig(),
        objective=objective,
        optimizer=OptimizerConfig(**options | optimizer),
    )


def policy_of(config: Config) -> Any:
    """A policy with the weights of the configuration's directory."""
    from checkpoints_conversion import hf_to_megatron
    from checkpoints_conversion.hf_files import read_hf_config
    from megatron_nft.policy.step import Policy

    path = Path(config.model.path)
    hf_config = read_hf_config(path)
    return Policy(config, hf_config, partial(hf_to_megatron.load, path=path, hf_config=hf_config))


def weights_of(policy: Any) -> Tensors:
    """A policy's weights by their Hugging Face names, as float32."""
    from checkpoints_conversion.stream import stream

    streamed = stream(policy.chunks, policy.hf_config)
    return {n: t.float().cpu().numpy().copy() for n, t in streamed}


def step(policy: Any, sequences: list[Sequence]) -> dict[str, Any]:
    """Log-probabilities, then loss, gradient norm and weights after one step of AdamW."""
    logp = policy.logp(sequences)
    metrics = policy.update(sequences, LR)
    return {"logp": logp, "weights": weights_of(policy), **metrics}


def gradient(
    path: Path,
    objective: ObjectiveConfig,
    layout: ParallelConfig,
    sequences: list[Sequence],
    variant: Variant | None = None,
    on_policy: bool = False,
) -> Tensors:
    """The gradient that the whole step follows, read off the weights.

    lr/ε is so large that the step does not drown in the rounding of the weight.
    """
    eps, scale, variant = 1e8, 1e4, variant or Variant()
    options = {"eps": eps, "weight_decay": 0.0, "clip_norm": 1e9}
    options |= {"tokens_per_microbatch": variant.budget}
    policy = policy_of(configured(path, objective, layout, variant.memory, **options))
    if on_policy:
        logp = policy.logp(sequences)
        sequences = [replace(s, old_logp=p) for s, p in zip(sequences, logp, strict=True)]
    before = weights_of(policy)
    with _rows_of(variant.row_multiple):
        metrics = policy.update(sequences, lr=eps * scale)
    if on_policy:
        assert abs(metrics["ratio"] - 1).max() < 1e-5
    return {n: (before[n] - w) / scale for n, w in weights_of(policy).items()}


def through_and_resumed(
    path: Path, objective: ObjectiveConfig, layout: ParallelConfig, sequences: list[Sequence]
) -> list[Tensors]:
    """Weights after two steps, and after a step that was saved, loaded elsewhere and gone on."""
    from megatron_nft.policy import checkpoint

    config = configured(path, objective, layout)
    first, second = policy_of(config), policy_of(config)
    folder = path.parent / "-".join(map(str, (path.name, *astuple(layout))))
    first.update(sequences, LR)
    checkpoint.save(folder, first, checkpoint.RunState(rollout=1), keep=1)
    checkpoint.load(checkpoint.latest(folder)[0], second)
    for policy in (first, second):
        policy.update(sequences, LR)
    return [weights_of(first), weights_of(second)]


def logp_on_lent_memory(policy: Any, sequences: list[Sequence]) -> list[np.ndarray]:
    """Log-probabilities, which need neither gradients nor optimizer."""
    from megatron_nft.policy.optimizer import gradient_buffers

    buffers = [b for chunk in policy.ddp_chunks for b in gradient_buffers(chunk)]
    sizes = [b.grad_data.untyped_storage().nbytes() for b in buffers]
    with policy.memory_lent():
        assert not any(b.grad_data.untyped_storage().nbytes() for b in buffers)
        logp = policy.logp(sequences)
    assert [b.grad_data.untyped_storage().nbytes() for b in buffers] == sizes
    assert all(sizes)
    return logp


@contextmanager
def _rows_of(multiple: int) -> Iterator[None]:
    """Pad every row to a multiple of so many tokens a rank, as FP8 wants it."""
    from megatron_nft.policy import fp8

    with pytest.MonkeyPatch.context() as patch:
        if multiple > 1:
            patch.setattr(fp8, "token_multiple", lambda _: multiple)
        yield
