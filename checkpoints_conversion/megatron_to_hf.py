"""From a live Megatron-Core model to a Hugging Face directory."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from transformers import PretrainedConfig

from checkpoints_conversion.hf_files import check_weights, expected_shapes, some
from checkpoints_conversion.hf_writer import SHARD_BYTES, HFWriter, carry_over, declare
from checkpoints_conversion.output import new_directory
from checkpoints_conversion.source import Info
from checkpoints_conversion.stream import stream


def export(
    chunks: Sequence[GPTModel],
    hf_config: PretrainedConfig,
    source: Path,
    out: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the model as a Hugging Face directory; collective, rank 0 writes.

    `source` is the directory that the model came from: its configuration, tokenizer and chat
    template are carried over. `out` appears under its name only when complete and checked; an
    earlier export there is replaced then.
    """
    tensors = stream(chunks, hf_config)
    if dist.get_rank() == 0:
        dtype = next(chunks[0].parameters()).dtype
        write(tensors, hf_config, dtype, source, out, shard_bytes)
    else:
        for _ in tensors:
            pass
    dist.barrier()


def write(
    tensors: Iterable[tuple[str, Tensor]],
    hf_config: PretrainedConfig,
    dtype: torch.dtype,
    source: Path,
    out: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors as they come; `out` is as before unless all have come.

    Raises:
        RuntimeError: tensors that the model does not have, of another shape, or missing.
    """
    infos = {name: Info(shape, dtype) for name, shape in expected_shapes(hf_config).items()}
    with new_directory(out, replaces=True) as partial:
        writer, missing = HFWriter(partial, infos, shard_bytes), set(infos)
        for name, tensor in tensors:
            found = Info(tuple(tensor.shape), tensor.dtype)
            if found != infos.get(name):
                raise RuntimeError(f"{name} is {found} and must be {infos.get(name)}")
            writer.write(name, 0, tensor.cpu().contiguous())
            missing.remove(name)
        if missing:
            raise RuntimeError(f"missing weights: {some(sorted(missing))}")
        writer.finish()
        carry_over(source, partial)
        declare(partial / "config.json", dtype)
        check_weights(partial, hf_config)
