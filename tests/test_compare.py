"""Comparing and inspecting checkpoints: what differs, where and by how much; what one holds."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from processes import run
from safetensors.torch import load_file, save_file
from toys import VOCAB_SIZE, save_model, save_tokenizer

from checkpoints_conversion import copying
from checkpoints_conversion.checkpoint import open_checkpoint
from checkpoints_conversion.compare import Comparison, compare
from checkpoints_conversion.convert import hf_to_megatron, megatron_to_hf
from checkpoints_conversion.inspection import inspect
from megatron_nft import cli

DOWN = "model.layers.1.mlp.down_proj.weight"
TEXT = "0a1b2c3d4e5f"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tokenizer(save_model(tmp_path / "model", "llama"))


@pytest.fixture
def other(model: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(model, model.with_name("other")))


@pytest.fixture
def megatron(model: Path) -> Path:
    out = model.with_name("megatron")
    hf_to_megatron(model, out)
    return out


def change(path: Path, **changes: torch.Tensor) -> None:
    file = path / "model.safetensors"
    save_file(load_file(file) | changes, file, metadata={"format": "pt"})


def weight(path: Path, name: str = DOWN) -> torch.Tensor:
    return load_file(path / "model.safetensors")[name].clone()


def compared(a: Path, b: Path) -> Comparison:
    return compare(open_checkpoint(a), open_checkpoint(b))


def command(*arguments: object) -> int:
    """`megatron-nft convert …`; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["megatron-nft", "convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return ended.value.code


# compare


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_both_forms_of_one_model_are_equal(tmp_path: Path, family: str) -> None:
    model = save_model(tmp_path / "model", family)
    hf_to_megatron(model, tmp_path / "megatron")
    pair = model, tmp_path / "megatron"
    for a in pair:
        for b in pair:
            result = compared(a, b)
            assert result.is_equal
            assert list(result.lines()) == [
                f"{len(result.a)} of {len(result.a)} common tensors are equal"
            ]


def test_the_largest_difference_and_its_place_are_named(
    model: Path, other: Path, megatron: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "PIECE_BYTES", 1000)  # the tensor is compared in pieces
    changed = weight(model)
    changed[3, 5] += 1.0
    changed[30, 7] -= 2.0
    change(other, **{DOWN: changed})
    for a in (model, megatron):
        result = compared(a, other)
        assert not result.is_equal
        assert list(result.differences) == [DOWN]
        found = result.differences[DOWN]
        assert found.num_numbers == 2
        assert found.index == (30, 7)
        assert found.largest == pytest.approx(2.0)
        assert found.values == (float(weight(model)[30, 7]), float(changed[30, 7]))
        [last] = [line for line in result.lines() if line.startswith(DOWN)]
        assert last.startswith(f"{DOWN}: 2 numbers differ, most by 2 at [30, 7] (")


def test_one_bit_is_a_difference(model: Path, other: Path) -> None:
    changed = weight(model)
    changed[4, 4] = torch.nextafter(changed[4, 4], torch.tensor(9.0))
    change(other, **{DOWN: changed})
    found = compared(model, other).differences[DOWN]
    assert (found.num_numbers, found.index) == (1, (4, 4))
    assert 0 < found.largest < 1e-6


def test_nan_equals_itself_and_nothing_else(model: Path, other: Path) -> None:
    broken = weight(model)
    broken[2, 1] = torch.nan
    change(model, **{DOWN: broken})
    found = compared(model, other).differences[DOWN]
    assert (found.num_numbers, found.index, found.largest) == (1, (2, 1), torch.inf)
    change(other, **{DOWN: broken})
    assert compared(model, other).is_equal


def test_signs_of_zero_are_bits(model: Path, other: Path) -> None:
    zeros = torch.zeros_like(weight(model))
    change(model, **{DOWN: zeros})
    change(other, **{DOWN: -zeros})
    assert compared(model, other).differences[DOWN].largest == 0.0


def test_dtypes_differ_though_the_numbers_may_not(model: Path, other: Path) -> None:
    tensors = {name: t.bfloat16() for name, t in load_file(model / "model.safetensors").items()}
    change(model, **{name: t.float() for name, t in tensors.items()})
    change(other, **tensors)
    result = compared(model, other)
    assert not result.is_equal
    assert not result.differences
    assert "dtype: torch.float32 in A, torch.bfloat16 in B" in list(result.lines())
    tensors[DOWN][0, 0] += 1
    change(other, **tensors)
    assert compared(model, other).differences[DOWN].largest == pytest.approx(1, abs=0.01)


def test_names_and_shapes_that_only_one_has(tmp_path: Path, model: Path) -> None:
    wider = save_model(tmp_path / "wider", "llama", intermediate_size=64, tied=True)
    lines = list(compared(model, wider).lines())
    assert "only in A: lm_head.weight" in lines
    assert f"shape of {DOWN}: (32, 48) in A, (32, 64) in B" in lines


def test_settings_decide_too(model: Path, other: Path) -> None:
    config = json.loads((other / "config.json").read_text())
    config |= {"rms_norm_eps": 0.1, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}
    (other / "config.json").write_text(json.dumps(config))
    result = compared(model, other)
    assert not result.is_equal
    assert not result.differences
    first = next(result.lines())
    assert first.startswith("configurations: rms_norm_eps is 1e-06 and 0.1; rope is {")


# outputs


@pytest.mark.processes
@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_megatrons_own_outputs_are_transformers(tmp_path: Path, family: str) -> None:
    model = save_tokenizer(save_model(tmp_path / "model", family))
    hf_to_megatron(model, tmp_path / "megatron")
    [found] = run(_outputs, 1, tmp_path / "megatron", model)
    assert found.num_tokens == len(TEXT)
    assert found.largest_logit < 1e-5
    assert found.largest_logp < 1e-5
    assert found.same_choice == 1.0


@pytest.mark.processes
def test_another_models_outputs_are_seen(model: Path, other: Path, megatron: Path) -> None:
    change(other, **{DOWN: -weight(model)})
    [found] = run(_outputs, 1, megatron, other)
    assert found.largest_logit > 0.01
    assert found.largest_logp > 0.01


def _outputs(a: Path, b: Path) -> object:
    from checkpoints_conversion.outputs import compare_outputs

    return compare_outputs(open_checkpoint(a), open_checkpoint(b), TEXT)


# inspect


def test_what_a_directory_holds(model: Path, megatron: Path) -> None:
    for path, form in ((model, "Hugging Face"), (megatron, "Megatron torch_dist")):
        found = inspect(path)
        assert found["format"] == form
        assert found["family"] == "LlamaForCausalLM"
        assert (found["layers"], found["hidden"], found["vocabulary"]) == (2, 32, VOCAB_SIZE)
        tensors = load_file(model / "model.safetensors")
        assert found["tensors"] == len(tensors)
        assert found["parameters"] == sum(t.numel() for t in tensors.values())
        assert found["bytes"] == sum(t.nbytes for t in tensors.values())
        assert found["dtypes"] == {"float32": len(tensors)}
        assert found["complete"] is True


def test_a_training_runs_checkpoint_says_where_the_run_stood(megatron: Path) -> None:
    """What policy/checkpoint.py writes; tests/test_train.py inspects a real one."""
    state = {"rollout": 3, "step": 24, "position": 96, "accuracy": 0.5}
    content = {"state": state, "parallel": {"tensor": 2}}
    (megatron / "complete.json").write_text(json.dumps(content))
    found = inspect(megatron)
    assert found["step"] == 24
    assert found["parallel layout"] == {"tensor": 2}


def test_what_is_incomplete_is_said_to_be(model: Path, megatron: Path) -> None:
    (megatron / "metadata.json").unlink()
    found = inspect(megatron)
    assert found["complete"] is False
    assert "incomplete checkpoint (no metadata.json)" in found["why"]
    (model / "model.safetensors").unlink()
    assert inspect(model)["complete"] is False


def test_a_directory_for_serving_is_looked_at(megatron: Path) -> None:
    out = megatron.parent / "served"
    megatron_to_hf(megatron, out, scheme="tensor")
    found = inspect(out)
    assert found["complete"] is True
    assert found["dtypes"]["float8_e4m3fn"] == 14
    assert found["quantization"]["quant_method"] == "fp8"
    with pytest.raises(ValueError, match="weights quantized with fp8"):
        open_checkpoint(out)


def test_a_marker_of_another_version(megatron: Path) -> None:
    for content in ('{"rollout": 3}', "{"):
        (megatron / "complete.json").write_text(content)
        found = inspect(megatron)
        assert found["complete"] is False
        assert "complete.json" in found["why"]


def test_experts_are_counted(tmp_path: Path) -> None:
    found = inspect(save_model(tmp_path / "model", "mixtral"))
    assert found["experts"] == 4
    assert found["experts a token"] == 2


# the command


def test_the_verbs_by_their_exit_codes(
    model: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    megatron, back = model.with_name("m"), model.with_name("back")
    assert command("hf-to-megatron", "--hf", model, "--out", megatron) == 0
    assert command("megatron-to-hf", "--checkpoint", megatron, "--out", back, "--workers", 1) == 0
    assert command("compare", model, back) == 0
    assert "equal" in capsys.readouterr().out.splitlines()
    change(other, **{DOWN: -weight(model)})
    assert command("compare", back, other) == 1
    assert "different" in capsys.readouterr().out.splitlines()
    assert command("inspect", back) == 0
    assert command("inspect", "--json", megatron) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["layers"] == 2
    (megatron / "metadata.json").unlink()
    assert command("inspect", megatron) == 1


def test_weights_that_are_not_finite(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = weight(model)
    broken[0, 0] = torch.inf
    change(model, **{DOWN: broken})
    out = model.with_name("out")
    assert command("hf-to-megatron", "--hf", model, "--out", out) == 2
    assert f"NaN or infinite weights in {DOWN}; --allow-nonfinite" in capsys.readouterr().err
    assert not out.exists()
    assert command("hf-to-megatron", "--hf", model, "--out", out, "--allow-nonfinite") == 0
    back = model.with_name("back")
    arguments = ("megatron-to-hf", "--checkpoint", out, "--out", back, "--allow-nonfinite")
    assert command(*arguments) == 0
    assert f"NaN or infinite weights in {DOWN}" in capsys.readouterr().out
    assert torch.equal(weight(back), broken)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect", "."), "is no checkpoint: neither config.json"),
        (("compare", "model", "absent"), "absent is no checkpoint"),
        (("hf-to-megatron", "--hf", "absent", "--out", "x"), "absent has no config.json"),
        (("hf-to-megatron", "--hf", "model", "--out", "other"), "other exists; give a new"),
        (("megatron-to-hf", "--checkpoint", "absent", "--out", "x"), "absent is no directory"),
        (("megatron-to-hf", "--checkpoint", "model", "--out", "x"), "no complete Megatron checkp"),
        (("hf-to-megatron", "--hf", "model", "--out", "x", "--workers", "0"), "--workers: was 0"),
    ],
)
@pytest.mark.usefixtures("other")
def test_mistakes_are_one_line(
    model: Path,
    arguments: tuple[str, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(model.parent)
    assert command(*arguments) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert {path.name for path in model.parent.iterdir()} == {"model", "other"}


def test_a_checkpoint_without_configuration_takes_the_models(model: Path, megatron: Path) -> None:
    shutil.rmtree(megatron / "hf")
    with pytest.raises(ValueError, match=r"has no hf/config\.json.*--hf"):
        megatron_to_hf(megatron, model.with_name("back"))
    megatron_to_hf(megatron, model.with_name("back"), hf=model)
    assert compared(model, model.with_name("back")).is_equal
    assert command("compare", model, megatron, "--hf", model) == 0
    assert command("inspect", megatron, "--hf", model) == 0
