"""What of a model's configuration decides its numbers, beside its weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from checkpoints_conversion.families import family_of, sizes_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def settings(hf_config: PretrainedConfig) -> dict[str, Any]:
    """Sizes, rope, norm and routing by name."""
    return {
        "architecture": hf_config.architectures[0],
        **asdict(sizes_of(hf_config)),
        **family_of(hf_config).options(hf_config),
        "tie_word_embeddings": hf_config.tie_word_embeddings,
        "rms_norm_eps": hf_config.rms_norm_eps,
        "rope": dict(hf_config.rope_parameters),
    }


def differing(a: PretrainedConfig, b: PretrainedConfig) -> list[str]:
    """The settings in which two models differ, in words; none where they compute alike."""
    ours, theirs = settings(a), settings(b)
    return [
        f"{name} is {ours.get(name)} and {theirs.get(name)}"
        for name in {**ours, **theirs}
        if ours.get(name) != theirs.get(name)
    ]
