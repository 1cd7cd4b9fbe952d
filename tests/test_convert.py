"""Checkpoints converted file to file: bit by bit what they were, whatever the sizes of pieces."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import VOCAB_SIZE, save_model, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints_conversion import copying, fp8, megatron_writer
from checkpoints_conversion.convert import hf_to_megatron, megatron_to_hf

MODEL_TYPES = ["qwen2", "qwen3", "llama", "mistral", "qwen3_moe", "mixtral"]
DOWN, NORM = "model.layers.1.mlp.down_proj.weight", "model.layers.1.input_layernorm.weight"
SMALL_SHARD = 20_000  # bytes: several files for the toy


def source(path: Path, model_type: str = "qwen2", tied: bool = False) -> Path:
    """A model with all that may lie beside it, byte by byte not as we would write it."""
    save_tokenizer(save_model(path, model_type, tied=tied))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"own": [1, 2]}, indent=7) + "\n\n")
    (path / "chat_template.jinja").write_text("{{ messages }} \u2713")
    (path / "vocab.txt").write_text("a\nb")
    (path / "LICENSE").write_text("free")
    (path / "README.md").write_text("not carried")
    (path / "pytorch_model.bin").write_text("not carried either")
    return path


def weights_of(path: Path) -> dict[str, Tensor]:
    return {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}


def change(path: Path, **changes: Tensor) -> None:
    save_file(weights_of(path) | changes, path / "model.safetensors", metadata={"format": "pt"})


def cast(path: Path, dtype: torch.dtype, *names: str) -> None:
    """Store these weights, or all, in another dtype, and say so where it is all."""
    tensors = weights_of(path)
    change(path, **{name: tensors[name].to(dtype) for name in names or tensors})
    if not names:
        text = (path / "config.json").read_text()
        assert '"float32"' in text
        (path / "config.json").write_text(text.replace("float32", str(dtype).split(".")[1]))


def shard(path: Path) -> None:
    """The weights in several files, as transformers cuts them, the configuration as it was."""
    config = (path / "config.json").read_bytes()
    (path / "pytorch_model.bin").unlink()
    model = AutoModelForCausalLM.from_pretrained(path)
    model.save_pretrained(path, max_shard_size=SMALL_SHARD)
    (path / "config.json").write_bytes(config)
    (path / "model.safetensors").unlink()
    assert len(list(path.glob("model-*.safetensors"))) > 2


def assert_bitwise_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


def assert_returned(out: Path, original: Path) -> None:
    """The same tensors; every other file byte by byte, but for those that are not carried."""
    assert_bitwise_equal(weights_of(out), weights_of(original))
    dropped = {"README.md", "pytorch_model.bin"}
    carried = {f.name for f in original.iterdir() if not f.name.startswith("model")} - dropped
    assert {f.name for f in out.iterdir() if not f.name.startswith("model")} == carried
    for name in carried:
        assert (out / name).read_bytes() == (original / name).read_bytes(), name


def there_and_back(original: Path, **options: int) -> Path:
    megatron, out = original.parent / "megatron", original.parent / "back"
    workers = {"workers": options.pop("workers", 2)}
    assert hf_to_megatron(original, megatron, **workers) == []
    assert megatron_to_hf(megatron, out, **workers, **options) == []
    assert {p.name for p in original.parent.iterdir()} == {original.name, "megatron", "back"}
    return out


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family_comes_back(tmp_path: Path, model_type: str, tied: bool) -> None:
    original = source(tmp_path / "hf", model_type, tied)
    out = there_and_back(original)
    assert_returned(out, original)
    assert ("lm_head.weight" in weights_of(out)) != tied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_moe"])
def test_every_dtype_comes_back(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    original = source(tmp_path / "hf", model_type)
    cast(original, dtype)
    assert_returned(there_and_back(original), original)


def test_each_kind_of_tensor_keeps_its_dtype(tmp_path: Path) -> None:
    original = source(tmp_path / "hf", "qwen3_moe")
    cast(original, torch.bfloat16)
    cast(original, torch.float32, *(n for n in weights_of(original) if "norm" in n))
    assert_returned(there_and_back(original), original)


def test_a_kind_of_tensor_has_one_dtype(tmp_path: Path) -> None:
    original = source(tmp_path / "hf")
    cast(original, torch.bfloat16, NORM)
    with pytest.raises(ValueError, match=r"layer_norm_weight: torch.float32 and torch.bfloat16"):
        hf_to_megatron(original, tmp_path / "megatron")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_several_files_come_back(tmp_path: Path) -> None:
    original = source(tmp_path / "hf")
    shard(original)
    out = there_and_back(original)
    assert_returned(out, original)
    assert (out / "model.safetensors").is_file()


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("piece_bytes", [1, 300])  # a row; a few, which end inside a QKV group
@pytest.mark.parametrize("model_type", ["qwen2", "mixtral"])
def test_sizes_of_pieces_parts_and_files_change_no_byte(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    piece_bytes: int,
    workers: int,
) -> None:
    original = source(tmp_path / "hf", model_type)
    shard(original)
    monkeypatch.setattr(copying, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(megatron_writer, "PART_BYTES", 1000)
    monkeypatch.setattr(megatron_writer, "FILE_BYTES", 20_000)
    out = there_and_back(original, workers=workers, shard_bytes=SMALL_SHARD)
    assert_returned(out, original)
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) > 2
    assert len(list(out.glob("model-*.safetensors"))) > 2
    again = tmp_path / "again"  # the index that is written is read
    hf_to_megatron(out, again)
    megatron_to_hf(again, tmp_path / "last")
    assert_returned(tmp_path / "last", original)


def test_the_same_source_makes_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = source(tmp_path / "hf", "mixtral")
    hf_to_megatron(original, tmp_path / "1", workers=1)
    monkeypatch.setattr(copying, "PIECE_BYTES", 300)
    hf_to_megatron(original, tmp_path / "4", workers=4)
    files = [path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*")]
    assert Path("__0_0.distcp") in files
    for name in files:
        if (tmp_path / "1" / name).is_file() and name.name != ".metadata":  # which has an id
            assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "4" / name).read_bytes()


def test_transformers_loads_what_comes_back(tmp_path: Path) -> None:
    original = source(tmp_path / "hf", "qwen3_moe")
    out = there_and_back(original, shard_bytes=SMALL_SHARD)
    tokens, logits = torch.arange(VOCAB_SIZE)[None], []
    (original / "pytorch_model.bin").unlink()
    for path in (original, out):
        with torch.no_grad():
            logits.append(AutoModelForCausalLM.from_pretrained(path)(tokens).logits)
    assert torch.equal(*logits)
    assert AutoTokenizer.from_pretrained(out)("ab12").input_ids == [51, 52, 3, 4]


def test_a_directory_that_is_named_beats_the_checkpoints_own(tmp_path: Path) -> None:
    original = source(tmp_path / "hf")
    hf_to_megatron(original, tmp_path / "megatron")
    (original / "chat_template.jinja").write_text("another")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", hf=original)
    assert_returned(tmp_path / "back", original)


# other dtypes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_rounds_once_and_is_declared(tmp_path: Path, dtype: str) -> None:
    original = source(tmp_path / "hf")
    hf_to_megatron(original, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", dtype=dtype)
    expected = {n: t.to(getattr(torch, dtype)) for n, t in weights_of(original).items()}
    assert_bitwise_equal(weights_of(tmp_path / "back"), expected)
    config, before = (
        json.loads((path / "config.json").read_text()) for path in (tmp_path / "back", original)
    )
    assert config == before | {"dtype": dtype}


@pytest.mark.parametrize("allows_nonfinite", [False, True])
def test_numbers_too_large_for_float16(tmp_path: Path, allows_nonfinite: bool) -> None:
    original = source(tmp_path / "hf")
    weight = weights_of(original)[DOWN]
    weight[3, 4] = 65520.0  # the least that float16 rounds to infinity
    weight[3, 5] = torch.inf if allows_nonfinite else 0.0
    change(original, **{DOWN: weight})
    hf_to_megatron(original, tmp_path / "megatron", allows_nonfinite=allows_nonfinite)
    with pytest.raises(
        ValueError, match=f"{DOWN}: numbers too large for torch.float16; give another --dtype"
    ):
        megatron_to_hf(
            tmp_path / "megatron",
            tmp_path / "back",
            dtype="float16",
            allows_nonfinite=allows_nonfinite,
        )
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "megatron"}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_weights_that_are_allowed_are_named_and_copied(
    tmp_path: Path, bad: float
) -> None:
    original = source(tmp_path / "hf")
    weight = weights_of(original)[DOWN]
    weight[-1, -1] = bad
    change(original, **{DOWN: weight})
    found = hf_to_megatron(original, tmp_path / "megatron", allows_nonfinite=True)
    assert found == [DOWN]
    found = megatron_to_hf(tmp_path / "megatron", tmp_path / "back", allows_nonfinite=True)
    assert found == [DOWN]
    assert_returned(tmp_path / "back", original)


# FP8 for serving


def half_step(numbers: Tensor) -> Tensor:
    """Half the distance between e4m3's neighbours at these magnitudes: 3 bits of mantissa."""
    return 2.0 ** (numbers.abs().clamp(min=2.0**-6).log2().floor() - 4)


def spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """Every number's scale."""
    if scale.ndim == 1:
        return scale.expand(shape)
    return scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]


@pytest.mark.parametrize("scheme", fp8.SCHEMES)
@pytest.mark.parametrize(("model_type", "piece_bytes"), [("qwen2", 300), ("mixtral", 8 << 20)])
def test_fp8_weights_with_their_scales(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    scheme: str,
    piece_bytes: int,
) -> None:
    monkeypatch.setattr(copying, "PIECE_BYTES", piece_bytes)
    wide = {"hidden_size": 256, "intermediate_size": 384}  # several blocks each way
    original, megatron = save_model(tmp_path / "hf", model_type, **wide), tmp_path / "megatron"
    hf_to_megatron(original, megatron)
    megatron_to_hf(megatron, tmp_path / "back", scheme=scheme)
    ours, theirs = weights_of(tmp_path / "back"), weights_of(original)
    quantized = [name for name in theirs if fp8.is_quantized(name)]
    assert len(quantized) > 10
    assert ours.keys() == theirs.keys() | {fp8.scale_name(name, scheme) for name in quantized}
    for name in theirs.keys() - set(quantized):
        assert torch.equal(ours[name], theirs[name].bfloat16()), name
    for name in quantized:
        weight, scale = ours[name], ours[fp8.scale_name(name, scheme)]
        blocks = tuple(-(-size // 128) for size in weight.shape)
        assert tuple(scale.shape) == (blocks if scheme == "block" else (1,))
        assert weight.dtype is torch.float8_e4m3fn
        exact = theirs[name].double() / spread(scale, weight.shape).double()
        assert ((weight.double() - exact).abs() <= half_step(exact) * (1 + 2**-20)).all(), name
        fused = fp8.fused_with(name)  # a server has one scale for all of these
        assert max(float(ours[n].float().abs().max()) for n in fused) == 448
        if scheme == "tensor":
            assert len({float(ours[fp8.scale_name(n, scheme)]) for n in fused}) == 1
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    declared, expected = config["quantization_config"], fp8.quantization_config(scheme, theirs)
    for said in (declared, expected):
        said["modules_to_not_convert"].sort()
    assert declared == expected
    with pytest.raises(ValueError, match="weights quantized with fp8"):
        hf_to_megatron(tmp_path / "back", tmp_path / "again")


def test_blocks_that_a_server_could_not_fuse(tmp_path: Path) -> None:
    hf_to_megatron(save_model(tmp_path / "hf", "qwen2"), tmp_path / "megatron")
    with pytest.raises(ValueError, match=r"q_proj.weight has 32 rows.*; use --fp8 tensor"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", scheme="block")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "megatron"}
