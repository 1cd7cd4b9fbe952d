"""Hugging Face directories: what they hold, and why some cannot be used."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import LLAMA3_ROPE, VOCAB_SIZE, save_model, save_qwen2
from transformers import AutoModelForCausalLM

from checkpoints_conversion.families import FAMILIES
from checkpoints_conversion.hf_files import HFWeights, check_weights, read_hf_config

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
SMALL_SHARD = 20_000  # bytes: several files for the toy
SUPPORTED = ", ".join(FAMILIES)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=r"\A\S") as raised:
        check_weights(path, read_hf_config(path))
    return str(raised.value)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """One file of weights."""
    return save_qwen2(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Several files with an index."""
    path = save_qwen2(tmp_path / "sharded")
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(path, max_shard_size=SMALL_SHARD)
    (path / "model.safetensors").unlink()
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
    assert refusal(sharded).startswith(f"{shard}: missing, but in the index; download it again")


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
    assert refusal(model).startswith(f"{model} holds neither model.safetensors nor")


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
        ({"architectures": ["PhiForCausalLM"]}, f"is a PhiForCausalLM; supported: {SUPPORTED}"),
        ({"architectures": ["LlamaForCausalLM"]}, "model_type 'qwen2' is no LlamaForCausalLM"),
        ({"architectures": ["MixtralForCausalLM"]}, "model_type 'qwen2' is no MixtralForCausalLM"),
        ({"architectures": ["NewForCausalLM"], "model_type": "new"}, "is a NewForCausalLM"),
        ({"model_type": "new"}, "config.json: transformers refuses it"),
        ({"hidden_size": "x"}, "'hidden_size' expected int"),
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


def change_config(path: Path, changes: dict) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, "(sliding_window=64)"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 64}, "(sliding_window=64)"),
        ("mistral", {"sliding_window": 64}, "sliding-window attention (sliding_window=64)"),
        ("mixtral", {"sliding_window": 64}, "sliding-window attention (sliding_window=64)"),
        ("qwen3", {"attention_bias": True}, "attention_bias=true"),
        ("llama", {"attention_bias": True}, "attention_bias=true"),
        ("llama", {"mlp_bias": True}, "mlp_bias=true"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias=true"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "layers without experts"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "layers without experts"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' (it may be 'silu')"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "quantized with fp8"),
        ("mistral", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "with gptq"),
    ],
)
def test_a_variant_that_is_not_computed_is_refused(
    tmp_path: Path, model_type: str, changes: dict, words: str
) -> None:
    path = save_model(tmp_path / "model", model_type)
    read_hf_config(path)
    change_config(path, changes)
    with pytest.raises(ValueError, match="unsupported") as raised:
        read_hf_config(path)
    assert str(raised.value).startswith(f"{path} has ")
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 128}),  # as long as the longest sequence
        ("llama", {"rope_parameters": LLAMA3_ROPE}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ],
)
def test_a_variant_that_is_computed_is_accepted(
    tmp_path: Path, model_type: str, changes: dict
) -> None:
    path = save_model(tmp_path / "model", model_type)
    change_config(path, changes)
    read_hf_config(path)


def test_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json; give the directory of a Hugging"):
        read_hf_config(tmp_path)
    with pytest.raises(ValueError, match=r"absent has no config\.json"):
        read_hf_config(tmp_path / "absent")
