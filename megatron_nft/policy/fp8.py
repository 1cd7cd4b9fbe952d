"""What FP8 asks of everything around Transformer Engine's matmuls."""

import os
from collections.abc import Mapping
from typing import Any

from megatron_nft.config import Fp8Config


def is_on(fp8: Fp8Config) -> bool:
    return fp8.format != "off"


def environment(fp8: Fp8Config) -> Mapping[str, str]:
    """What Transformer Engine must find in the environment when it is imported.

    Blockwise scales are powers of two without it; Hopper's kernels take any float32.
    """
    is_blockwise = is_on(fp8) and fp8.recipe == "blockwise"
    return {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"} if is_blockwise else {}


def check_environment(fp8: Fp8Config) -> None:
    """Raise a ValueError where a process was started without it."""
    for name, value in environment(fp8).items():
        if os.environ.get(name) != value:
            raise ValueError(
                f"fp8.recipe={fp8.recipe} needs {name}={value} in the environment of every process "
                f"(it was {os.environ.get(name)!r}); export it before torchrun"
            )


def options(fp8: Fp8Config) -> dict[str, Any]:
    """The FP8 keys of Megatron's TransformerConfig; none where FP8 is off.

    Parameters stay bf16: weights leave for the engine and for files as they are trained.
    """
    if not is_on(fp8):
        return {}
    return {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "fp8_margin": fp8.margin,
        "fp8_amax_history_len": fp8.amax_history_len,
        "fp8_amax_compute_algo": fp8.amax_compute_algo,
        "fp8_wgrad": fp8.wgrad,
        "first_last_layers_bf16": fp8.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": fp8.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": fp8.num_layers_at_end_in_bf16,
    }


def token_multiple(fp8: Fp8Config) -> int:
    """What the tokens of a matmul must be a multiple of (Megatron's get_fp8_align_size)."""
    if not is_on(fp8):
        return 1
    return 32 if fp8.recipe == "mxfp8" else 16
