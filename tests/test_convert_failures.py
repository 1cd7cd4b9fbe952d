"""Conversions that fail: one line says why, and nothing is lost or left behind."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import save_model
from transformers import AutoModelForCausalLM

from checkpoints_conversion.convert import hf_to_megatron, megatron_to_hf
from checkpoints_conversion.safetensors_file import lay_out
from checkpoints_conversion.source import Info

DOWN, EMBEDDING = "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"
Convert = Callable[[Path, Path], object]


def contents(path: Path) -> dict[str, str]:
    """Every file below a directory, by its hash."""
    files = [file for file in path.rglob("*") if file.is_file()]
    return {str(f.relative_to(path)): sha256(f.read_bytes()).hexdigest() for f in files}


@contextmanager
def refused(directory: Path, words: str) -> Iterator[None]:
    """The error says so much, and the directory is as it was."""
    before, names = contents(directory), {path.name for path in directory.iterdir()}
    with pytest.raises(ValueError, match=words):
        yield
    assert {path.name for path in directory.iterdir()} == names
    assert contents(directory) == before


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return save_model(tmp_path / "hf", "qwen2")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    path = save_model(tmp_path / "hf", "qwen2")
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(path, max_shard_size=20_000)
    (path / "model.safetensors").unlink()
    return path


@pytest.fixture
def megatron(hf: Path) -> Path:
    path = hf.parent / "megatron"
    hf_to_megatron(hf, path)
    return path


def change(path: Path, **changes: torch.Tensor) -> None:
    tensors = load_file(path / "model.safetensors") | changes
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def change_config(path: Path, **changes: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# from Hugging Face


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def _damage_header(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(12)
        stream.write(b"\xff\xff\xff")


def _move_offsets(file: Path) -> None:
    """Two tensors on the same bytes."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    first, second, *_ = (entry for name, entry in header.items() if name != "__metadata__")
    for place in ("shape", "dtype", "data_offsets"):
        second[place] = first[place]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def _append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0" * 8)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "missing, but in the index"),
        (_truncate, "damaged or truncated"),
        (_damage_header, "damaged or truncated"),
        (_move_offsets, "damaged"),
        (_append, "damaged or truncated"),
    ],
)
def test_a_damaged_shard_is_named(
    sharded: Path, damage: Callable[[Path], None], words: str
) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    damage(shard)
    with refused(sharded.parent, rf"{shard}: .*{words}"):
        hf_to_megatron(sharded, sharded.parent / "out")


def test_an_index_that_names_an_absent_tensor(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = sorted(content["weight_map"].values())[-1]
    content["weight_map"]["model.layers.7.extra"] = file
    index.write_text(json.dumps(content))
    with refused(sharded.parent, rf"{file}: the index promises model.layers.7.extra"):
        hf_to_megatron(sharded, sharded.parent / "out")


def test_a_model_of_no_known_family(hf: Path) -> None:
    change_config(hf, architectures=["GPT2LMHeadModel"])
    with refused(hf.parent, "is a GPT2LMHeadModel; supported: Qwen2ForCausalLM, "):
        hf_to_megatron(hf, hf.parent / "out")


def test_weights_of_another_model(hf: Path) -> None:
    change_config(hf, intermediate_size=64)
    with refused(hf.parent, r"_proj.weight has shape \(48, 32\), but config.json makes it \(64, "):
        hf_to_megatron(hf, hf.parent / "out")
    change_config(hf, intermediate_size=48, num_hidden_layers=3, layer_types=None)
    words = "missing weights: model.layers.2.input_layernorm.weight, .* and 7 more"
    with refused(hf.parent, words):
        hf_to_megatron(hf, hf.parent / "out")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_named(hf: Path, megatron: Path, bad: float) -> None:
    weight = load_file(hf / "model.safetensors")[DOWN]
    weight[7, 7] = bad
    change(hf, **{DOWN: weight})
    words = "NaN or infinite weights in {}; --allow-nonfinite goes on"
    with refused(hf.parent, words.format(DOWN)):
        hf_to_megatron(hf, hf.parent / "out")
    shutil.rmtree(megatron)
    hf_to_megatron(hf, megatron, allows_nonfinite=True)
    for options in ({}, {"dtype": "bfloat16"}, {"scheme": "tensor"}):
        with refused(hf.parent, words.format(DOWN)):
            megatron_to_hf(megatron, hf.parent / "out", **options)


# from Megatron


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("metadata.json", Path.unlink, r"an incomplete checkpoint \(no metadata.json\)"),
        (".metadata", Path.unlink, r"no complete Megatron checkpoint \(no .metadata\)"),
        (".metadata", _truncate, r"\.metadata: damaged"),
        ("__0_0.distcp", Path.unlink, r"__0_0\.distcp: missing"),
        ("__0_0.distcp", lambda f: os.truncate(f, 100_000), r"__0_0\.distcp: truncated \(100000 "),
        ("__0_0.distcp", lambda f: f.write_bytes(bytes(f.stat().st_size)), "damaged at byte 0"),
    ],
)
def test_a_damaged_checkpoint(
    megatron: Path, name: str, damage: Callable[[Path], None], words: str
) -> None:
    damage(megatron / name)
    with refused(megatron.parent, words):
        megatron_to_hf(megatron, megatron.parent / "out")


def test_the_directory_above_a_checkpoint(megatron: Path) -> None:
    with refused(megatron.parent, "there are checkpoints in it: megatron"):
        megatron_to_hf(megatron.parent, megatron.parent / "out")


def test_a_checkpoint_without_configuration(hf: Path, megatron: Path) -> None:
    shutil.rmtree(megatron / "hf")
    with refused(hf.parent, r"has no hf/config\.json.*name .* with --hf"):
        megatron_to_hf(megatron, hf.parent / "out")


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("qwen2", {"intermediate_size": 64}, r"linear_fc1.weight has shape \(2, 96, 32\), but"),
        ("qwen2", {"vocab_size": 68}, r"word_embeddings.weight has shape \(67, 32\), but"),
        ("qwen2", {"num_hidden_layers": 3}, r"has shape \(2, .*\), but .* makes it \(3, "),
        ("qwen2", {"tied": True}, "weights that the model does not have: output_layer.weight"),
        ("llama", {}, "weights that the model does not have: .*linear_qkv.bias"),
        ("qwen3", {"head_dim": 8}, "missing weights: .*k_layernorm.weight, .*q_layernorm.weight"),
        ("mixtral", {}, "missing weights: .*experts.experts.linear_fc1.weight, .*router.weight"),
    ],
)
def test_a_checkpoint_of_another_model(
    megatron: Path, model_type: str, changes: dict, words: str
) -> None:
    """By its own configuration, and by its tensors where it has none."""
    other = save_model(megatron.parent / "other", model_type, **changes)
    with refused(megatron.parent, f"--hf: {other} is not {megatron}'s model: "):
        megatron_to_hf(megatron, megatron.parent / "out", hf=other)
    shutil.rmtree(megatron / "hf")
    with refused(megatron.parent, words):
        megatron_to_hf(megatron, megatron.parent / "out", hf=other)


def test_a_checkpoint_of_the_same_shapes_with_other_heads(megatron: Path) -> None:
    other = save_model(
        megatron.parent / "other", "qwen2", num_attention_heads=2, num_key_value_heads=1
    )
    with refused(megatron.parent, "num_heads is 4 and 2; num_kv_heads is 2 and 1; head_dim is 8"):
        megatron_to_hf(megatron, megatron.parent / "out", hf=other)


def test_a_vocabulary_that_no_padding_explains(megatron: Path) -> None:
    """67 rows for a vocabulary of 40 may be padding; with 300 more they are another model's."""
    path = megatron.parent
    hf_to_megatron(save_model(path / "large", "qwen2", vocab_size=400), path / "other")
    shutil.rmtree(path / "other" / "hf")
    with refused(path, r"word_embeddings.weight has shape \(400, 32\), but .* makes it \(67, 32"):
        megatron_to_hf(path / "other", path / "out", hf=path / "hf")


def test_a_tied_checkpoint_has_no_head(tmp_path: Path, hf: Path) -> None:
    hf_to_megatron(save_model(tmp_path / "tied", "qwen2", tied=True), tmp_path / "megatron")
    shutil.rmtree(tmp_path / "megatron" / "hf")
    with refused(tmp_path, "missing weights: output_layer.weight"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "out", hf=hf)


def test_a_head_of_its_own_in_a_model_that_ties_it(hf: Path) -> None:
    change_config(hf, tie_word_embeddings=True)
    with refused(hf.parent, "ties the head to the embedding, but lm_head.weight is another one"):
        hf_to_megatron(hf, hf.parent / "out")
    embedding = load_file(hf / "model.safetensors")["model.embed_tokens.weight"]
    change(hf, **{"lm_head.weight": embedding.clone()})
    hf_to_megatron(hf, hf.parent / "out")


def test_two_models_in_one_directory(sharded: Path) -> None:
    other = save_model(sharded.parent / "other", "qwen2", seed=1)
    shutil.copy(other / "model.safetensors", sharded)
    with refused(sharded.parent, "holds both model.safetensors and model.safetensors.index.json"):
        hf_to_megatron(sharded, sharded.parent / "out")


def test_weights_in_fp8_whose_configuration_says_nothing(hf: Path) -> None:
    change(hf, **{DOWN: load_file(hf / "model.safetensors")[DOWN].to(torch.float8_e4m3fn)})
    with refused(hf.parent, f"{DOWN} is FP8; take the original in bfloat16"):
        hf_to_megatron(hf, hf.parent / "out")


# the disk


def to_megatron(directory: Path, out: Path) -> object:
    return hf_to_megatron(directory / "hf", out)


def to_hf(directory: Path, out: Path) -> object:
    return megatron_to_hf(directory / "megatron", out)


BOTH = pytest.mark.parametrize("convert", [to_megatron, to_hf])


@BOTH
def test_an_existing_directory_is_left_alone(megatron: Path, convert: Convert) -> None:
    out = megatron.parent / "out"
    out.mkdir()
    (out / "file").write_text("precious")
    with refused(megatron.parent, f"--out: {out} exists"):
        convert(megatron.parent, out)


@BOTH
def test_a_disk_without_room(
    megatron: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with refused(megatron.parent, r"--out: .* has 0.0 GB free, and out needs 0.1 GB; make room"):
        convert(megatron.parent, megatron.parent / "out")


@BOTH
def test_a_parent_that_is_no_directory(megatron: Path, convert: Convert) -> None:
    (megatron.parent / "file").touch()
    with refused(megatron.parent, "cannot be made: Not a directory"):
        convert(megatron.parent, megatron.parent / "file" / "out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, of which the toy's conversion needs more."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@BOTH
def test_a_disk_that_fills_up(
    megatron: Path, small_disk: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else's files may come after the look at the room."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))
    with refused(megatron.parent, "No space left on device"):
        convert(megatron.parent, small_disk / "out")


@BOTH
@pytest.mark.parametrize("num_bytes", [1_000, 60_000])
def test_a_file_that_must_not_grow(megatron: Path, convert: Convert, num_bytes: int) -> None:
    """As with a quota; Python ignores the signal that comes with it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with refused(megatron.parent, "File too large"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
        try:
            convert(megatron.parent, megatron.parent / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# other processes


PROGRAM = """
import sys
from pathlib import Path
from checkpoints_conversion import convert, copying
copying.PIECE_BYTES = int(sys.argv[4])
getattr(convert, sys.argv[1])(Path(sys.argv[2]), Path(sys.argv[3]))
"""


@contextmanager
def converting(verb: Convert, source: Path, out: Path) -> Iterator[subprocess.Popen]:
    """A process that writes `out`, row by row, and will need a while."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, verb.__name__, source, out, "1"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # ignored, and so inherited, where the tests were started in a shell's background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    partial, deadline = out.with_name(out.name + ".partial"), time.monotonic() + 60
    try:
        while not any(partial.glob("*.*tensors")) and not any(partial.glob("*.distcp")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Both forms of a model with 300,000 rows, at each of which a conversion can be stopped."""
    path = save_model(tmp_path / "hf", "llama", vocab_size=300_000, hidden_size=4, head_dim=4)
    hf_to_megatron(path, tmp_path / "megatron")
    return tmp_path


VERBS = pytest.mark.parametrize(
    ("verb", "source"), [(hf_to_megatron, "hf"), (megatron_to_hf, "megatron")]
)


@pytest.mark.processes
@pytest.mark.alone
@VERBS
def test_a_killed_process_leaves_no_directory(large: Path, verb: Convert, source: str) -> None:
    before = contents(large)
    with converting(verb, large / source, large / "out") as process:
        process.kill()
        process.wait()
    assert {path.name for path in large.iterdir()} == {"hf", "megatron", "out.partial"}
    (large / "out.partial" / "stale").touch()
    for out in ("out", "undisturbed"):
        verb(large / source, large / out)
    assert not (large / "out.partial").exists()
    after, another = contents(large / "out"), contents(large / "undisturbed")
    assert after.keys() == another.keys()
    assert {n for n in after if after[n] != another[n]} <= {".metadata"}  # which has an id
    for out in ("out", "undisturbed"):
        shutil.rmtree(large / out)
    assert contents(large) == before


@pytest.mark.processes
@pytest.mark.alone
@VERBS
def test_an_interrupted_process_leaves_nothing_and_a_second_one_is_refused(
    large: Path, verb: Convert, source: str
) -> None:
    before = contents(large)
    with converting(verb, large / source, large / "out") as process:
        with pytest.raises(ValueError, match=r"out\.partial: another process is writing it"):
            verb(large / source, large / "out")
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert contents(large) == before
    assert {path.name for path in large.iterdir()} == {"hf", "megatron"}


# memory


# VmHWM, as the kernel's other count (ru_maxrss) begins with what the parent process had
MEASURED = """
import re, sys
from pathlib import Path
from checkpoints_conversion.convert import hf_to_megatron, megatron_to_hf
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
path, imported = Path(sys.argv[1]), peak()
hf_to_megatron(path / "hf", path / "megatron", workers=2)
one = peak()
megatron_to_hf(path / "megatron", path / "back", workers=2)
print((one - imported) >> 10, (peak() - imported) >> 10)
"""


@pytest.mark.processes
@pytest.mark.alone
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Tensors of 200 MB, 600 MB together: a few pieces of them at a time, either way."""
    hf = save_model(tmp_path / "hf", "llama")
    width, ffn, vocab = 1024, 2 * 4096, 100_000
    change_config(hf, hidden_size=width, intermediate_size=ffn, vocab_size=vocab, head_dim=8)
    header, _, num_bytes = lay_out(_bfloat16_infos(hf))
    assert 5e8 < num_bytes < 7e8
    (hf / "model.safetensors").write_bytes(header)
    os.truncate(hf / "model.safetensors", num_bytes)  # zeros that need no disk
    command = [sys.executable, "-W", "ignore", "-c", MEASURED, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert (tmp_path / "back" / "model.safetensors").stat().st_size == num_bytes
    for name in ("megatron", "back"):
        shutil.rmtree(tmp_path / name)
    to_megatron_mib, both_mib = map(int, result.stdout.split())
    assert 1 < to_megatron_mib < 150  # less than a piece was not measured
    assert 1 < both_mib < 150


def _bfloat16_infos(hf: Path) -> dict[str, Info]:
    from checkpoints_conversion.hf_files import expected_shapes, read_hf_config

    shapes = expected_shapes(read_hf_config(hf))
    return {name: Info(shape, torch.bfloat16) for name, shape in shapes.items()}
