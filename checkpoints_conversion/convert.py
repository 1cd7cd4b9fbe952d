"""Checkpoints from the one form to the other, file to file: no model, no GPU, no process group.

Memory is bounded by a few pieces of a tensor (copying.py), whatever the model's size.
"""

import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_conversion import fp8
from checkpoints_conversion.copying import copy, is_finite
from checkpoints_conversion.families import sizes_of
from checkpoints_conversion.hf_files import HFWeights, read_hf_config, stored_infos
from checkpoints_conversion.hf_writer import SHARD_BYTES, HFWriter, carry_over, declare
from checkpoints_conversion.megatron_files import MegatronFiles, check_complete
from checkpoints_conversion.megatron_names import HF_FILES
from checkpoints_conversion.megatron_writer import MegatronWriter
from checkpoints_conversion.output import check_free, new_directory
from checkpoints_conversion.settings import differing
from checkpoints_conversion.source import Info
from checkpoints_conversion.views import View, as_hf, as_megatron, only

DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}


def hf_to_megatron(
    hf: Path, out: Path, *, workers: int = 2, allows_nonfinite: bool = False
) -> list[str]:
    """Convert a Hugging Face directory to a Megatron-Core distributed checkpoint.

    It loads at any tensor-, pipeline- and expert-parallel size. Dtypes stay as they are.

    Returns:
        The names of tensors with NaN or infinite numbers, where they are allowed.

    Raises:
        ValueError: the source is damaged or of no known family, weights are not finite, or `out`
            exists or has no room. Nothing is left under `out`'s name then.
    """
    hf_config = read_hf_config(hf)
    view = as_megatron(HFWeights(hf, hf_config), hf_config)
    check_free(out, _num_bytes(view.infos))
    with new_directory(out) as partial:
        (partial / HF_FILES).mkdir()
        carry_over(hf, partial / HF_FILES)
        writer = MegatronWriter(partial, view.infos, sizes_of(hf_config))
        found = copy(
            view,
            writer.write,
            workers=workers,
            title="to Megatron",
            allows_nonfinite=allows_nonfinite,
            describe=view.sources,
        )
        writer.finish()
        MegatronFiles(partial, hf_config).check()
    return found


def megatron_to_hf(
    checkpoint: Path,
    out: Path,
    *,
    hf: Path | None = None,
    dtype: str | None = None,
    scheme: str | None = None,
    workers: int = 2,
    allows_nonfinite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Convert a Megatron-Core distributed checkpoint to a Hugging Face directory.

    Args:
        hf: the directory with the model's configuration and tokenizer, where the checkpoint does
            not have them itself.
        dtype: of the weights; by default what the checkpoint has, and bfloat16 beside FP8.
        scheme: of FP8 weights for serving, `block` or `tensor`; None for none.

    Returns, raises: as hf_to_megatron; numbers too large for `dtype` are an error too.
    """
    if scheme not in (None, *fp8.SCHEMES):
        raise ValueError(f"scheme was {scheme!r}; it may be {', '.join(fp8.SCHEMES)}")
    hf = hf_files_of(checkpoint, hf)
    hf_config = read_hf_config(hf)
    view = as_hf(MegatronFiles(checkpoint, hf_config), hf_config)
    target = DTYPES[dtype or "bfloat16"] if dtype or scheme else None
    if scheme == "block":
        _check_blocks(view.infos)
    infos = _target_infos(view.infos, target, scheme)
    check_free(out, _num_bytes(infos))
    with new_directory(out) as partial:
        carry_over(hf, partial)
        writer = HFWriter(partial, infos, shard_bytes)
        take = Taker(writer, scheme, _scales(view, scheme, workers))
        found = copy(
            view,
            take.write,
            workers=workers,
            title="to Hugging Face",
            multiple=fp8.BLOCK if scheme else 1,
            allows_nonfinite=allows_nonfinite,
        )
        writer.finish()
        changes = {"quantization_config": fp8.quantization_config(scheme, infos)} if scheme else {}
        declare(partial / "config.json", target or _common_dtype(infos), **changes)
        if stored_infos(partial) != infos:
            raise RuntimeError(f"{partial}: the files do not hold what was written into them")
    return found


def hf_files_of(checkpoint: Path, given: Path | None = None) -> Path:
    """Where a checkpoint's model has its configuration and tokenizer.

    Args:
        given: a directory to be preferred to the checkpoint's own.

    Raises:
        ValueError: there is none, the given one is of another model, or there is no complete
            checkpoint.
    """
    check_complete(checkpoint)
    has_own = (checkpoint / HF_FILES / "config.json").is_file()
    if given is not None:
        if has_own and (why := differing(*map(read_hf_config, (checkpoint / HF_FILES, given)))):
            raise ValueError(f"--hf: {given} is not {checkpoint}'s model: {'; '.join(why[:3])}")
        return given
    if not has_own:
        raise ValueError(
            f"{checkpoint} has no {HF_FILES}/config.json, as checkpoints of this program have; "
            "name the directory of the original model with --hf"
        )
    return checkpoint / HF_FILES


class Taker:
    """Casts or quantizes rows on their way to a writer."""

    def __init__(self, writer: HFWriter, scheme: str | None, scales: Mapping[str, Tensor]) -> None:
        self._writer, self._scheme, self._scales = writer, scheme, scales

    def write(self, name: str, start: int, rows: Tensor) -> None:
        """`copy`'s contract."""
        if not (self._scheme and fp8.is_quantized(name)):
            self._writer.write(name, start, self._cast(name, rows))
            return
        scale_name = fp8.scale_name(name, self._scheme)
        if self._scheme == "block":
            weights, scales = fp8.quantize_blocks(rows)
            self._writer.write(scale_name, start // fp8.BLOCK, scales)
        else:
            scale = self._scales[name]
            weights = fp8.quantize_rows(rows, scale)
            if start == 0:
                shape = self._writer.infos[scale_name].shape
                self._writer.write(scale_name, 0, scale.reshape(shape))
        self._writer.write(name, start, weights)

    def _cast(self, name: str, rows: Tensor) -> Tensor:
        cast = rows.to(self._writer.infos[name].dtype)
        is_suspect = cast.dtype != rows.dtype and not is_finite(cast)
        if is_suspect and (rows.isfinite() & cast.isinf()).any():
            raise ValueError(f"{name}: numbers too large for {cast.dtype}; give another --dtype")
        return cast


def _check_blocks(infos: Mapping[str, Info]) -> None:
    """Refuse what vLLM could not fuse: blocks that reach into the next weight."""
    for name, info in infos.items():
        if not fp8.is_quantized(name) or info.shape[0] % fp8.BLOCK == 0:
            continue
        if fp8.fused_with(name)[-1] != name:
            raise ValueError(
                f"--fp8 block: {name} has {info.shape[0]} rows, which is no multiple of "
                f"{fp8.BLOCK}, and vLLM could not load it; use --fp8 tensor"
            )


def _scales(view: View, scheme: str | None, workers: int) -> dict[str, Tensor]:
    """One scale for all that a server fuses, which takes a pass over the weights of its own."""
    if scheme != "tensor":
        return {}
    names = [name for name in view.infos if fp8.is_quantized(name)]
    largest = dict.fromkeys(names, torch.tensor(0.0))
    lock = threading.Lock()

    def look(name: str, start: int, rows: Tensor) -> None:
        magnitude = fp8.largest_magnitude(rows)
        with lock:
            for fused in fp8.fused_with(name):
                largest[fused] = largest[fused].maximum(magnitude)

    copy(
        only(view, names), look, workers=workers, title="largest magnitudes", allows_nonfinite=True
    )
    return {name: fp8.scale_of(magnitude) for name, magnitude in largest.items()}


def _target_infos(
    infos: Mapping[str, Info], dtype: torch.dtype | None, scheme: str | None
) -> dict[str, Info]:
    """What the tensors become (of their own dtype by default), a scale after each quantized one."""
    if not scheme:
        return {name: Info(info.shape, dtype or info.dtype) for name, info in infos.items()}
    found: dict[str, Info] = {}
    for name, info in infos.items():
        if not fp8.is_quantized(name):
            found[name] = Info(info.shape, dtype)
            continue
        found[name] = Info(info.shape, torch.float8_e4m3fn)
        shape = fp8.scale_shape(info.shape, scheme) or (1,)  # which servers take for a scalar
        found[fp8.scale_name(name, scheme)] = Info(shape, torch.float32)
    return found


def _common_dtype(infos: Mapping[str, Info]) -> torch.dtype:
    """The dtype of most bytes: a router or norm in float32 makes no float32 model."""
    num_bytes = Counter()
    for info in infos.values():
        num_bytes[info.dtype] += info.num_bytes
    return num_bytes.most_common(1)[0][0]


def _num_bytes(infos: Mapping[str, Info]) -> int:
    return sum(info.num_bytes for info in infos.values())
