"""What FP8 asks of everything around Transformer Engine's matmuls."""

import os
from typing import Any

from megatron_nft.config import Fp8Config


def is_on(fp8: Fp8Config) -> bool:
    return fp8.format != "off"


def options(fp8: Fp8Config) -> dict[str, Any]:
    """The FP8 keys of Megatron's TransformerConfig; none where FP8 is off.

    Parameters stay bf16: weights leave for the engine and for files as they are trained.
    """
    if not is_on(fp8):
        return {}
    if fp8.recipe == "blockwise":  # scales as Hopper's kernels want them; Transformer Engine's own
        os.environ.setdefault("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")
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
