"""Converted checkpoints and Megatron-Core itself: it loads what is written, and saves what is read.

Processes cost far more than conversions: each launch takes all layouts of its size, one after the
other, with all models.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from policies import configured, policy_of
from processes import run
from reference import LR
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import random_sequences, save_model

from checkpoints_conversion.buckets import BUCKET_BYTES
from checkpoints_conversion.convert import hf_to_megatron, megatron_to_hf
from checkpoints_conversion.hf_files import read_hf_config
from checkpoints_conversion.megatron_files import read_metadata
from megatron_nft.config import Config, ModelConfig, ObjectiveConfig, ParallelConfig


@dataclass(frozen=True)
class Model:
    """A toy, and where it lies once it is saved and converted."""

    model_type: str
    tied: bool = False
    dtype: str = "float32"
    hf: Path = Path()
    megatron: Path = Path()

    @property
    def has_experts(self) -> bool:
        return self.model_type in ("qwen3_moe", "mixtral")


MODELS = {
    "Qwen2": Model("qwen2"),
    "Qwen2, tied": Model("qwen2", tied=True),
    "Qwen2, bfloat16": Model("qwen2", dtype="bfloat16"),
    "Qwen3": Model("qwen3"),
    "Llama": Model("llama"),
    "Llama, tied": Model("llama", tied=True),
    "Mistral": Model("mistral"),
    "Qwen3-MoE": Model("qwen3_moe"),
    "Qwen3-MoE, tied": Model("qwen3_moe", tied=True),
    "Mixtral": Model("mixtral"),
}
EXPERTS = [name for name, model in MODELS.items() if model.has_experts]
SP = {"tensor": 2, "sequence": True}  # which Megatron wants with experts
LAYOUTS = {  # by the number of processes
    1: {"TP1": {}},
    2: {"TP2": SP, "PP2": {"pipeline": 2}, "EP2": {"expert": 2}},
    4: {
        "TP2·PP2": SP | {"pipeline": 2},
        "TP2·PP2·VPP2": SP | {"pipeline": 2, "virtual_pipeline": 2},
        "TP2·PP2·EP2": SP | {"pipeline": 2, "expert": 2},
    },
}
CASES = [
    (layout, name)
    for layouts in LAYOUTS.values()
    for layout, options in layouts.items()
    for name in (EXPERTS if "expert" in options else MODELS)
]
BUCKETS_BYTES = (1, 10_000, BUCKET_BYTES)  # every parameter alone, some together, all
TRAINED = ["Qwen2, tied", "Qwen3-MoE"]


# what the processes do


def _load_and_save(
    layouts: dict[str, dict[str, Any]], models: dict[str, Model], saved: Path
) -> dict[tuple[str, str], list[str]]:
    """Names of the tensors that are not the source's, once Megatron has loaded the checkpoint.

    Megatron then saves it anew.
    """
    from megatron_nft.policy import parallel

    found = {}
    parallel.initialize(ParallelConfig(), seed=0)
    for layout, options in layouts.items():
        parallel_config = ParallelConfig(**options)
        parallel.lay_groups(parallel_config, seed=0)
        for name in (name for where, name in CASES if where == layout):
            found[layout, name] = _load(models[name], parallel_config, saved / layout / name)
    parallel.finalize()
    return found


def _load(model: Model, parallel_config: ParallelConfig, saved: Path) -> list[str]:
    from megatron.core import dist_checkpointing

    from checkpoints_conversion.stream import stream
    from megatron_nft.policy.architecture import build_model, transformer_config

    hf_config = read_hf_config(model.hf)
    config = Config(model=ModelConfig(dtype=model.dtype), parallel=parallel_config)
    chunks = build_model(hf_config, transformer_config(hf_config, config))
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        parameter.data.fill_(torch.nan)  # what is not loaded is seen
    wanted = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
    loaded = dist_checkpointing.load(wanted, str(model.megatron))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{i}"])
        _spoil_padding(chunk, hf_config.vocab_size)
    expected = load_file(model.hf / "model.safetensors")
    streams = [_copied(stream(chunks, hf_config, bucket_bytes)) for bucket_bytes in BUCKETS_BYTES]
    assert len({tuple(streamed) for streamed in streams}) == 1  # in one order
    assert streams[0].keys() == expected.keys()
    _save({f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}, saved)
    return [
        name
        for name, tensor in expected.items()
        if not all(_is_equal(tensor, streamed[name]) for streamed in streams)
    ]


def _copied(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors}


def _save(state: dict[str, Any], path: Path) -> None:
    from megatron.core import dist_checkpointing

    path.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(state, str(path))


def _spoil_padding(chunk: torch.nn.Module, vocab_size: int) -> None:
    """Whatever training leaves in the padded rows must stay in them."""
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in chunk.named_parameters():
        if "word_embeddings" in name or "output_layer" in name:
            parameter.data[max(0, vocab_size - rank * len(parameter)) :] = 7.0


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _train_and_export(models: dict[str, Model], folder: Path) -> None:
    """One step on two data-parallel ranks, a checkpoint with the optimizer, and a live export."""
    from checkpoints_conversion import megatron_to_hf as live
    from megatron_nft.policy import checkpoint, parallel

    parallel.initialize(ParallelConfig(), seed=0)
    for name in TRAINED:
        path, objective = models[name].hf, ObjectiveConfig(name="nft")
        policy = policy_of(configured(path, objective, ParallelConfig(), dtype="bfloat16"))
        policy.update(random_sequences(13), LR)
        checkpoint.save(folder / name, policy, checkpoint.RunState(rollout=1), keep=1)
        live.export(policy.chunks, policy.hf_config, path, folder / name / "live")
    parallel.finalize()


# what came back


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("live")


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Model]:
    """Every model, saved by transformers and converted."""
    found = {}
    for name, model in MODELS.items():
        hf, megatron = folder / "hf" / name, folder / "megatron" / name
        save_model(hf, model.model_type, tied=model.tied, num_hidden_layers=4)
        if model.dtype != "float32":
            tensors = load_file(hf / "model.safetensors")
            cast = {name: t.to(getattr(torch, model.dtype)) for name, t in tensors.items()}
            save_file(cast, hf / "model.safetensors")
        hf_to_megatron(hf, megatron)
        found[name] = replace(model, hf=hf, megatron=megatron)
    return found


@pytest.fixture(scope="module")
def loaded(models: dict[str, Model], folder: Path) -> dict[tuple[str, str], list[list[str]]]:
    """By layout and model: the names that differ, on every rank."""
    found = {}
    for num_processes, layouts in LAYOUTS.items():
        ranks = run(_load_and_save, num_processes, layouts, models, folder / "saved")
        found |= {case: [rank[case] for rank in ranks] for case in ranks[0]}
    return found


@pytest.mark.processes
@pytest.mark.parametrize(("layout", "name"), CASES)
def test_megatron_loads_what_is_written(
    loaded: dict[tuple[str, str], list[list[str]]], layout: str, name: str
) -> None:
    assert not any(loaded[layout, name])


@pytest.mark.processes
@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(("layout", "name"), CASES)
def test_what_megatron_saves_comes_back(
    models: dict[str, Model], folder: Path, tmp_path: Path, layout: str, name: str
) -> None:
    model = models[name]
    assert megatron_to_hf(folder / "saved" / layout / name, tmp_path / "hf", hf=model.hf) == []
    assert_same_weights(tmp_path / "hf", model.hf)


@pytest.mark.processes
@pytest.mark.usefixtures("loaded")
def test_what_megatron_saved_was_padded_and_in_parts(folder: Path) -> None:
    """What the tests above take apart: 68 rows for two ranks, and parts with some columns."""
    metadata = read_metadata(folder / "saved" / "TP2·PP2" / "Qwen2").state_dict_metadata
    embedding = metadata["embedding.word_embeddings.weight"]
    assert [tuple(chunk.sizes) for chunk in embedding.chunks] == [(34, 32), (34, 32)]
    down = metadata["decoder.layers.mlp.linear_fc2.weight"]
    assert {tuple(chunk.sizes) for chunk in down.chunks} == {(1, 32, 24)}


@pytest.mark.processes
def test_a_training_checkpoint_is_what_the_live_model_exports(
    models: dict[str, Model], folder: Path, tmp_path: Path
) -> None:
    run(_train_and_export, 2, models, folder)
    for name in TRAINED:
        checkpoint, live = folder / name / "rollout_1", folder / name / "live"
        before, after = (load_file(p / "model.safetensors") for p in (models[name].hf, live))
        assert any(not torch.equal(before[n].bfloat16(), tensor) for n, tensor in after.items())
        megatron_to_hf(checkpoint, tmp_path / name, hf=models[name].hf)
        assert_same_weights(tmp_path / name, live)
        assert (tmp_path / name / "config.json").read_bytes() == (live / "config.json").read_bytes()


def assert_same_weights(ours: Path, theirs: Path) -> None:
    found, expected = (load_file(path / "model.safetensors") for path in (ours, theirs))
    assert found.keys() == expected.keys()
    assert not [name for name, tensor in expected.items() if not _is_equal(found[name], tensor)]
