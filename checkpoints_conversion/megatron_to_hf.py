"""From a live Megatron-Core model to a Hugging Face directory."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from checkpoints_conversion.hf_files import check_weights
from checkpoints_conversion.stream import stream

SHARD_BYTES = 5_000_000_000
CARRIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")  # beside the weights


def export(
    chunks: Sequence[GPTModel], hf_config: PretrainedConfig, source: Path, out: Path
) -> None:
    """Write the model as a Hugging Face directory; collective, rank 0 writes.

    `source` is the directory that the model came from: its configuration, tokenizer and chat
    template are carried over. `out` appears under its name only when complete and checked; an
    earlier export there is replaced then.
    """
    tensors = stream(chunks, hf_config)
    if dist.get_rank() == 0:
        _write(tensors, hf_config, source, out)
    else:
        for _ in tensors:
            pass
    dist.barrier()


def _write(
    tensors: Iterable[tuple[str, Tensor]], hf_config: PretrainedConfig, source: Path, out: Path
) -> None:
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _carry_over(source, partial)
    dtype = _write_shards(tensors, partial)
    _declare_dtype(partial / "config.json", dtype)
    check_weights(partial, hf_config)
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _carry_over(source: Path, out: Path) -> None:
    for pattern in CARRIED:
        for file in source.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, out / file.name)


def _declare_dtype(file: Path, dtype: torch.dtype) -> None:
    """transformers and vLLM convert the weights to what config.json says they are."""
    config, name = json.loads(file.read_text()), str(dtype).removeprefix("torch.")
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if config.get(key) != name:
        file.write_text(json.dumps(config | {key: name}, indent=2) + "\n")


def _write_shards(tensors: Iterable[tuple[str, Tensor]], out: Path) -> torch.dtype:
    """Write the weights, with an index where they fill several files; their dtype."""
    names, total_bytes = [], 0
    for number, shard in enumerate(_shards(tensors), start=1):
        save_file(shard, out / f"shard-{number}.safetensors", metadata={"format": "pt"})
        names.append(list(shard))
        dtype = next(iter(shard.values())).dtype
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
    if len(names) == 1:
        (out / "shard-1.safetensors").rename(out / "model.safetensors")
        return dtype
    weight_map = {}
    for number, shard_names in enumerate(names, start=1):
        file = f"model-{number:05d}-of-{len(names):05d}.safetensors"
        (out / f"shard-{number}.safetensors").rename(out / file)
        weight_map |= dict.fromkeys(shard_names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return dtype


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Group the stream into dictionaries of at most SHARD_BYTES, copied to the host."""
    shard: dict[str, Tensor] = {}
    num_bytes = 0
    for name, tensor in tensors:
        if shard and num_bytes + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, num_bytes = {}, 0
        shard[name] = tensor.to("cpu", copy=True).contiguous()
        num_bytes += tensor.nbytes
    yield shard
