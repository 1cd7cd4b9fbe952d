"""Hugging Face directory to live Megatron model and back: nothing is lost, added or changed."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run
from safetensors.torch import load_file
from toys import VOCAB_SIZE, save_qwen2, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from checkpoints_conversion import megatron_to_hf
from checkpoints_conversion.hf_files import read_hf_config
from checkpoints_conversion.hf_writer import SHARD_BYTES

HEAD = "lm_head.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
SMALL_SHARD = 20_000  # bytes: several files for the toy


def source(path: Path, tied: bool = False) -> Path:
    save_tokenizer(save_qwen2(path, tied=tied, num_hidden_layers=4))
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "LICENSE").write_text("free")
    (path / "README.md").write_text("not carried")
    return path


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}


def logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        return model(torch.arange(VOCAB_SIZE)[None]).logits


def assert_same_model(export: Path, original: Path) -> None:
    ours, theirs = weights_of(export), weights_of(original)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert torch.equal(logits(export), logits(original))


# through live models


LAYOUTS = {  # by the number of processes, which cost more than all that they do
    2: {"DP2": {}, "TP2": {"tensor": 2}, "PP2": {"pipeline": 2}},
    4: {"TP2·PP2·VPP2": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}},
}
SHARDS = {False: SHARD_BYTES, True: SMALL_SHARD}  # bytes a file, by whether the model is tied
Streams = dict[tuple[str, bool], dict[str, np.ndarray]]  # by layout and whether tied


def _convert(layouts: dict[str, dict[str, int]], folder: Path) -> Streams:
    """Each source into a live model, and out as a stream and as a directory."""
    from checkpoints_conversion import hf_to_megatron, stream
    from megatron_nft.config import Config, ModelConfig, ParallelConfig
    from megatron_nft.policy import parallel
    from megatron_nft.policy.architecture import build_model, transformer_config

    streamed = {}
    parallel.initialize(ParallelConfig(), seed=0)
    for layout, options in layouts.items():
        config = Config(model=ModelConfig(dtype="float32"), parallel=ParallelConfig(**options))
        parallel.lay_groups(config.parallel, seed=0)
        for tied, shard_bytes in SHARDS.items():
            original = folder / f"source-{tied}"
            hf_config = read_hf_config(original)
            chunks = build_model(hf_config, transformer_config(hf_config, config))
            hf_to_megatron.load(chunks, original, hf_config)
            for chunk in chunks:
                _spoil_padding(chunk, hf_config)
            tensors = stream.stream(chunks, hf_config)
            streamed[layout, tied] = {n: t.numpy().copy() for n, t in tensors}
            out = folder / layout / f"export-{tied}"
            megatron_to_hf.export(chunks, hf_config, original, out, shard_bytes)
    parallel.finalize()
    return streamed


def _spoil_padding(model: torch.nn.Module, hf_config: PretrainedConfig) -> None:
    """Whatever training leaves in the padded rows must stay in them."""
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in model.named_parameters():
        if "word_embeddings" in name or "output_layer" in name:
            own = max(0, hf_config.vocab_size - rank * len(parameter))
            with torch.no_grad():
                parameter[own:] = 7.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("live")


@pytest.fixture(scope="module")
def streams(folder: Path) -> list[Streams]:
    """What every rank of every launch has streamed."""
    for tied in SHARDS:
        source(folder / f"source-{tied}", tied)
    return [
        streams
        for num_processes, layouts in LAYOUTS.items()
        for streams in run(_convert, num_processes, layouts, folder)
    ]


@pytest.mark.processes
@pytest.mark.parametrize("tied", SHARDS)
@pytest.mark.parametrize("layout", [layout for found in LAYOUTS.values() for layout in found])
def test_a_model_comes_back_as_it_was(
    folder: Path, streams: list[Streams], layout: str, tied: bool
) -> None:
    original, out = folder / f"source-{tied}", folder / layout / f"export-{tied}"
    expected = weights_of(original)
    mine = [found[layout, tied] for found in streams if (layout, tied) in found]
    assert len(mine) == next(n for n, layouts in LAYOUTS.items() if layout in layouts)
    for streamed in mine:
        assert streamed.keys() == expected.keys()
        assert all(np.array_equal(streamed[n], t.numpy()) for n, t in expected.items())
    assert_same_model(out, original)
    assert (HEAD in weights_of(out)) != tied
    carried = {file.name for file in original.iterdir()} - {"README.md", "model.safetensors"}
    assert {file.name for file in out.iterdir() if "model" not in file.name} == carried
    for file in carried:
        assert (out / file).read_bytes() == (original / file).read_bytes()
    assert AutoTokenizer.from_pretrained(out)("ab12").input_ids == [51, 52, 3, 4]
    assert (out / "model.safetensors").is_file() != tied
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2 or not tied
    assert {path.name for path in (folder / layout).iterdir()} == {"export-False", "export-True"}


# the directory that is written


def write(
    original: Path,
    out: Path,
    tensors: Iterable[tuple[str, torch.Tensor]] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Export a directory's tensors, as a live model's would be."""
    tensors = weights_of(original).items() if tensors is None else tensors
    config = read_hf_config(original)
    megatron_to_hf.write(tensors, config, torch.float32, original, out, shard_bytes)


def test_large_weights_fill_several_files_with_an_index(tmp_path: Path) -> None:
    original, out = source(tmp_path / "source"), tmp_path / "export"
    write(original, out, shard_bytes=SMALL_SHARD)
    expected = weights_of(original)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    numbered = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, 1 + len(files))]
    assert files == numbered
    for file in files:
        tensors = load_file(out / file)
        assert sorted(tensors) == sorted(n for n, f in index["weight_map"].items() if f == file)
        assert sum(t.nbytes for t in tensors.values()) <= SMALL_SHARD
    assert_same_model(out, original)
    write(out, tmp_path / "again")  # reads the index as well as it writes it
    assert_same_model(tmp_path / "again", original)


def test_an_earlier_export_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
    original, out = source(tmp_path / "source"), tmp_path / "export"
    write(original, out)
    changed = {name: tensor + 1 for name, tensor in weights_of(original).items()}

    def dies() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(changed.items())[:5]
        raise RuntimeError("a rank died")

    lost = {name: tensor for name, tensor in changed.items() if name != DOWN}
    failures = {
        "a rank died": dies(),
        f"missing weights: {DOWN}": lost.items(),
        rf"{DOWN} is .*\(48, 32\).* and must be .*\(32, 48\)": [(DOWN, changed[DOWN].T)],
        f"{DOWN} is .*bfloat16.* and must be .*float32": [(DOWN, changed[DOWN].bfloat16())],
        "bonus is .* and must be None": [("bonus", changed[DOWN])],
    }
    for words, tensors in failures.items():
        with pytest.raises(RuntimeError, match=words):
            write(original, out, tensors)
        assert_same_model(out, original)
        assert {path.name for path in tmp_path.iterdir()} == {"source", "export"}

    (out / "stale").touch()
    write(original, out, changed.items())
    assert torch.equal(weights_of(out)[DOWN], changed[DOWN])
    assert not (out / "stale").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "export"}


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_configuration_says_what_dtype_the_weights_are(tmp_path: Path, key: str) -> None:
    """transformers loads weights in config.json's dtype: float32 would be rounded to bfloat16."""
    original, out = source(tmp_path / "source"), tmp_path / "export"
    config = json.loads((original / "config.json").read_text())
    del config["dtype"]
    (original / "config.json").write_text(json.dumps(config | {key: "bfloat16"}))
    write(original, out)
    assert json.loads((out / "config.json").read_text()) == config | {key: "float32"}
    assert AutoModelForCausalLM.from_pretrained(out).dtype is torch.float32
