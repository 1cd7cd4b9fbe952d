"""FP8 weights of a Hugging Face checkpoint that is to be served: what is quantized, and how.

The weights of the projections of attention, MLP and experts become float8_e4m3fn with float32
scales; value = fp8 × scale. Embeddings, norms, biases, routers and the head stay as they are.

    block   `X.weight_scale_inv` [⌈out/128⌉, ⌈in/128⌉]: one scale for every 128×128 block
    tensor  `X.weight_scale` [1]: one scale for the whole weight

What we rely on (vLLM 0.32, `layers/quantization/fp8.py`; transformers 5, FineGrainedFP8Config):

- Both read `quant_method`, `activation_scheme`, `weight_block_size` and `modules_to_not_convert`;
  `fmt` is for the reader. A null `weight_block_size` means `tensor`; transformers takes an absent
  one for 128×128.
- vLLM compares whole names of modules: a router that is not listed would be FP8 (Qwen3's; Mixtral's
  never is). A head is never FP8 in vLLM; in transformers it is unless listed, a tied one too.
- vLLM fuses projections (`fused_with`). In `block` all of them but the last must have a multiple
  of 128 rows (on several tensor-parallel ranks: each of them, on each rank, and each rank's input
  features as well). In `tensor` vLLM rounds them once more, by way of float16, to the largest of
  their scales; where they have one scale, and it is at least 2^-15, this changes nothing.
- transformers computes with `block` alone: to it a per-tensor scale has another name.
"""

import re
from collections.abc import Iterable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SCHEMES = ("block", "tensor")
BLOCK = 128  # rows and columns of a block: vLLM's kernels know no other
TILE = 32 * BLOCK  # columns of a row of blocks that are worked on at once: 2 MiB in float32
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448

_QUANTIZED = re.compile(r".*(_proj|\.experts\.\d+\.w[123])\.weight")
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def is_quantized(hf_name: str) -> bool:
    """True of the two-dimensional weights of attention, MLP and experts."""
    return _QUANTIZED.fullmatch(hf_name) is not None


def fused_with(hf_name: str) -> tuple[str, ...]:
    """The quantized weights that vLLM holds as one with this one, itself among them."""
    module, projection, _ = hf_name.rsplit(".", 2)
    group = next((group for group in _FUSED if projection in group), (projection,))
    return tuple(f"{module}.{name}.weight" for name in group)


def scale_name(hf_name: str, scheme: str) -> str:
    """The name of a quantized weight's scale."""
    return hf_name + ("_scale_inv" if scheme == "block" else "_scale")


def scale_shape(shape: tuple[int, ...], scheme: str) -> tuple[int, ...]:
    """The shape of the scale of a weight [out, in], or of a piece of its rows."""
    return tuple(-(-size // BLOCK) for size in shape) if scheme == "block" else ()


def quantization_config(scheme: str, hf_names: Iterable[str]) -> dict[str, Any]:
    """What config.json says under this name.

    Args:
        hf_names: all tensors of the checkpoint, without the scales.
    """
    kept = (name for name in hf_names if name.endswith(".weight") and not is_quantized(name))
    modules = dict.fromkeys(("lm_head", *(name.removesuffix(".weight") for name in kept)))
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK] if scheme == "block" else None,
        "modules_to_not_convert": list(modules),
    }


def largest_magnitude(values: Tensor, dims: tuple[int, ...] = ()) -> Tensor:
    """The largest finite magnitude, float32, over these dimensions (default: all); 0 if none is."""
    magnitudes = values.abs()
    largest = magnitudes.amax(dims)
    if not largest.isfinite().all():
        largest = magnitudes.nan_to_num_(nan=0.0, posinf=0.0).amax(dims)
    return largest.float()


def scale_of(largest: Tensor) -> Tensor:
    """The scales, float32, that take these largest magnitudes (float32) to 448.

    Zero has the scale 1. No scale is subnormal: a GPU might take it for zero.
    """
    scale = (largest / E4M3_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
    return torch.where(largest > 0, scale, 1.0)


def quantize_blocks(rows: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 rows and their scales in the scheme `block`.

    Numbers are divided in float32 and rounded once, to the nearest, ties to even. NaN and infinity
    become NaN, the one of the two that e4m3 has, and have no part in the scale.

    Args:
        rows: [r, in], floating; r is a multiple of 128 except where the weight ends.

    Returns:
        float8_e4m3fn [r, in] and float32 [⌈r/128⌉, ⌈in/128⌉].
    """
    weight = rows.new_empty(rows.shape, dtype=torch.float8_e4m3fn)
    scale = rows.new_empty(scale_shape(rows.shape, "block"), dtype=torch.float32)
    for i, j in product(range(0, rows.shape[0], BLOCK), range(0, rows.shape[1], TILE)):
        tile = slice(i, i + BLOCK), slice(j, j + TILE)
        scales = _quantize_tile(rows[tile], weight[tile])
        scale[i // BLOCK, j // BLOCK : (j + TILE) // BLOCK] = scales
    return weight, scale


def _quantize_tile(rows: Tensor, out: Tensor) -> Tensor:
    """A row of blocks into `out`; their scales, float32 [⌈in/128⌉]."""
    padded = F.pad(rows, (0, -rows.shape[1] % BLOCK)).float()
    blocks = padded.view(len(rows), -1, BLOCK)
    scale = scale_of(largest_magnitude(blocks, (0, 2)))
    _write((blocks / scale[:, None]).view_as(padded)[:, : rows.shape[1]], out)
    return scale


def quantize_rows(rows: Tensor, scale: Tensor) -> Tensor:
    """FP8 rows [r, in] in the scheme `tensor`, rounded as by `quantize_blocks`.

    Args:
        rows: [r, in], floating.
        scale: float32 []; `scale_of` the largest magnitude in all the rows that share it.
    """
    weight = rows.new_empty(rows.shape, dtype=torch.float8_e4m3fn)
    parts = (tensor.view(-1).split(BLOCK * TILE) for tensor in (rows.contiguous(), weight))
    for part, out in zip(*parts, strict=True):
        _write(part.float() / scale, out)
    return weight


def _write(multiples: Tensor, out: Tensor) -> None:
    """Round float32 multiples of the scale into `out`, and use them up.

    What the cast makes of infinity and of numbers beyond 448 differs between versions of torch:
    448 here, NaN there. So none is left to it.
    """
    if not multiples.sum().isfinite():
        multiples.masked_fill_(multiples.isinf(), torch.nan)
    out.copy_(multiples.clamp_(-E4M3_MAX, E4M3_MAX))


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """The numbers, float32 [out, in], that a server computes with, from either scheme."""
    if scale.ndim == 2:
        for dim, size in enumerate(weight.shape):
            scale = scale.repeat_interleave(BLOCK, dim).narrow(dim, 0, size)
    return weight.float() * scale
