"""Hugging Face directory to live Megatron model and back: nothing is lost, added or changed."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run
from safetensors.torch import load_file, save_file
from toys import VOCAB_SIZE, save_qwen2, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from checkpoints_conversion import megatron_to_hf
from checkpoints_conversion.hf_files import HFWeights, check_weights, read_hf_config

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
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


def _convert(
    layout: dict[str, int], jobs: list[tuple[Path, Path, int]]
) -> list[dict[str, np.ndarray]]:
    """Each (source, out, bytes a file) into a live model, out as a stream and as a directory."""
    from checkpoints_conversion import hf_to_megatron, stream
    from megatron_nft.config import Config, ModelConfig, ParallelConfig
    from megatron_nft.policy import parallel
    from megatron_nft.policy.architecture import build_model, transformer_config

    parallel_config, streamed = ParallelConfig(**layout), []
    parallel.initialize(parallel_config, seed=0)
    for original, out, shard_bytes in jobs:
        hf_config = read_hf_config(original)
        config = Config(model=ModelConfig(dtype="float32"), parallel=parallel_config)
        chunks = build_model(hf_config, transformer_config(hf_config, config))
        hf_to_megatron.load(chunks, original, hf_config)
        for chunk in chunks:
            _spoil_padding(chunk, hf_config)
        streamed.append({n: t.numpy().copy() for n, t in stream.stream(chunks, hf_config)})
        megatron_to_hf.SHARD_BYTES = shard_bytes
        megatron_to_hf.export(chunks, hf_config, original, out)
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


@pytest.mark.processes
@pytest.mark.parametrize(
    ("num_processes", "layout"),
    [
        (1, {}),
        (2, {"tensor": 2}),
        (2, {"pipeline": 2}),
        (4, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}),
    ],
)
def test_a_model_comes_back_as_it_was(
    tmp_path: Path, num_processes: int, layout: dict[str, int]
) -> None:
    jobs = [
        (source(tmp_path / f"source-{tied}", tied), tmp_path / f"export-{tied}", shard_bytes)
        for tied, shard_bytes in ((False, 5_000_000_000), (True, SMALL_SHARD))
    ]
    ranks = run(_convert, num_processes, layout, jobs)
    for number, (original, out, _) in enumerate(jobs):
        expected = weights_of(original)
        for streamed in (rank[number] for rank in ranks):
            assert streamed.keys() == expected.keys()
            assert all(np.array_equal(streamed[n], t.numpy()) for n, t in expected.items())
        assert_same_model(out, original)
        assert (HEAD in weights_of(out)) == (number == 0)
        files = {file.name for file in out.iterdir()}
        carried = {file.name for file in original.iterdir()} - {"README.md", "model.safetensors"}
        assert {file for file in files if "model" not in file} == carried
        for file in carried:
            assert (out / file).read_bytes() == (original / file).read_bytes()
        assert AutoTokenizer.from_pretrained(out)("ab12").input_ids == [51, 52, 3, 4]
    assert (jobs[0][1] / "model.safetensors").is_file()
    assert len(list(jobs[1][1].glob("model-*-of-*.safetensors"))) > 2
    assert {path.name for path in tmp_path.iterdir()} == {p.name for job in jobs for p in job[:2]}


# the directory that is written


def write(original: Path, out: Path, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Export a directory's tensors, as a live model's would be."""
    stream = iter((tensors or weights_of(original)).items())
    megatron_to_hf._write(stream, read_hf_config(original), original, out)


def test_large_weights_fill_several_files_with_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron_to_hf, "SHARD_BYTES", SMALL_SHARD)
    original, out = source(tmp_path / "source"), tmp_path / "export"
    write(original, out)
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

    config = read_hf_config(original)
    with pytest.raises(RuntimeError, match="a rank died"):
        megatron_to_hf._write(dies(), config, original, out)
    assert_same_model(out, original)
    lost = {name: tensor for name, tensor in changed.items() if name != DOWN}
    with pytest.raises(ValueError, match=f"missing weights: {DOWN}"):
        write(original, out, lost)
    with pytest.raises(ValueError, match=rf"{DOWN} has shape \(48, 32\)"):
        write(original, out, changed | {DOWN: changed[DOWN].T})
    assert_same_model(out, original)

    (out / "stale").touch()
    write(original, out, changed)
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


# directories that cannot be used


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=r"\A\S") as raised:
        check_weights(path, read_hf_config(path))
    return str(raised.value)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """One file of weights."""
    return save_qwen2(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Several files with an index."""
    monkeypatch.setattr(megatron_to_hf, "SHARD_BYTES", SMALL_SHARD)
    path = tmp_path / "sharded"
    write(save_qwen2(tmp_path / "whole"), path)
    return path


def change(path: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors (None: remove) in a directory with one file."""
    tensors = weights_of(path) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})


def test_good_directories_are_accepted(model: Path, sharded: Path) -> None:
    for path in (model, sharded):
        config = read_hf_config(path)
        check_weights(path, config)
        assert torch.equal(HFWeights(path, config)[DOWN], weights_of(path)[DOWN])


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*"))[2]
    shard.unlink()
    assert refusal(sharded).startswith(f"{shard}: missing, though the index names it")


@pytest.mark.parametrize("keep", [0, 5, 200, 10_000, -1])
def test_a_truncated_shard_is_named(sharded: Path, keep: int) -> None:
    shard = sorted(sharded.glob("model-0*"))[2]
    shard.write_bytes(shard.read_bytes()[:keep])
    assert refusal(sharded).startswith(f"{shard}: damaged or truncated")


def test_a_pointer_that_git_lfs_left_is_named(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4\n")
    assert refusal(model).startswith(f"{file}: damaged or truncated")


def test_an_index_that_names_an_absent_tensor(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = sorted(content["weight_map"].values())[0]
    content["weight_map"] |= {DOWN: first}
    index.write_text(json.dumps(content))
    assert refusal(sharded) == f"{sharded / first}: the index promises {DOWN}, not found in it"


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not JSON"), ("", "not JSON"), ("[]", "held list"), ("{}", "no weight_map")],
)
def test_a_broken_index_is_named(sharded: Path, text: str, words: str) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(text)
    message = refusal(sharded)
    assert message.startswith(f"{index}: ")
    assert words in message


def test_missing_and_unknown_tensors_are_named(model: Path) -> None:
    original = weights_of(model)
    change(model, **{DOWN: None, HEAD: None})
    assert refusal(model) == f"{model}: missing weights: {HEAD}, {DOWN}"
    layer = {name: None for name in original if ".layers.1." in name}
    change(model, **layer)
    assert "and 8 more" in refusal(model)
    change(model, **original, extra=torch.ones(1))
    assert refusal(model) == f"{model}: weights that the model does not have: extra"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (EMBEDDING, (VOCAB_SIZE + 1, 32)),  # which padding for TP 2 would hide
        (EMBEDDING, (VOCAB_SIZE - 1, 32)),
        (DOWN, (48, 32)),
        ("model.layers.0.self_attn.q_proj.bias", (40,)),
        ("model.norm.weight", (1,)),  # which broadcasting would hide
    ],
)
def test_a_wrong_shape_is_named(model: Path, name: str, shape: tuple[int, ...]) -> None:
    expected = tuple(weights_of(model)[name].shape)
    change(model, **{name: torch.zeros(shape)})
    message = refusal(model)
    assert message.startswith(f"{model / 'model.safetensors'}: {name} has shape {shape}")
    assert f"config.json makes it {expected}" in message


def test_no_weights_at_all(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert refusal(model).startswith(f"model.path: {model} holds neither model.safetensors nor")


def test_a_tied_models_copy_of_its_embedding_is_accepted(tmp_path: Path) -> None:
    path = save_qwen2(tmp_path / "model", tied=True)
    assert HEAD not in weights_of(path)
    change(path, **{HEAD: weights_of(path)[EMBEDDING].clone()})
    check_weights(path, read_hf_config(path))


def test_tensors_that_the_configuration_determines_are_accepted(model: Path) -> None:
    change(model, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    check_weights(model, read_hf_config(model))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"architectures": ', "config.json: not JSON"),
        ("", "config.json: not JSON"),
        ("[1]", "config.json: held list"),
        ("{}", "without `architectures`"),
        ({"architectures": ["LlamaForCausalLM"]}, "is a LlamaForCausalLM; supported: Qwen2For"),
        ({"architectures": ["NewForCausalLM"], "model_type": "new"}, "is a NewForCausalLM"),
        ({"model_type": "new"}, "config.json: transformers refuses it"),
        ({"hidden_size": "x"}, "'hidden_size' expected int"),
        ({"use_sliding_window": True}, "sliding-window attention"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
    ],
)
def test_a_configuration_that_cannot_be_used(model: Path, text: str | dict, words: str) -> None:
    file = model / "config.json"
    content = text if isinstance(text, str) else json.dumps(json.loads(file.read_text()) | text)
    file.write_text(content)
    with pytest.raises(ValueError, match="model") as raised:
        read_hf_config(model)
    assert str(model) in str(raised.value)
    assert words in str(raised.value)


def test_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json; give the directory of a Hugging"):
        read_hf_config(tmp_path)
    with pytest.raises(ValueError, match=r"absent has no config\.json"):
        read_hf_config(tmp_path / "absent")
