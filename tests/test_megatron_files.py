"""Megatron's distributed checkpoints without Megatron: what torch's own reader and writer see."""

import json
import pickle
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from toys import save_model

from checkpoints_conversion import megatron_writer
from checkpoints_conversion.convert import hf_to_megatron
from checkpoints_conversion.families import mappings_for, sizes_of
from checkpoints_conversion.hf_files import HFWeights, read_hf_config
from checkpoints_conversion.mapping import Sizes
from checkpoints_conversion.megatron_files import MegatronFiles
from checkpoints_conversion.megatron_names import parameter_keys, stacks, written_stacks

DENSE = Sizes(num_layers=3, num_heads=1, num_kv_heads=1, head_dim=1, vocab=1, hidden=1, ffn=1)
MOE = Sizes(**vars(DENSE) | {"num_experts": 5})
NORM = "decoder.layers.1.pre_mlp_layernorm.weight"
MODEL_TYPES = ["qwen2", "qwen3", "llama", "mistral", "qwen3_moe", "mixtral"]


def parameters(path: Path) -> dict[str, Tensor]:
    """A directory's parameters as a whole live model has them, by the names of the table."""
    hf_config = read_hf_config(path)
    weights, sizes = HFWeights(path, hf_config), sizes_of(hf_config)
    return {
        name: mapping.split([weights[hf_name] for hf_name in hf_names], 0, 1, sizes)
        for mapping in mappings_for(hf_config)
        for name, hf_names in mapping.names(sizes)
    }


def assert_holds(checkpoint: Path, original: Path) -> None:
    """Every row of every parameter, from any row on."""
    files = MegatronFiles(checkpoint, read_hf_config(original))
    expected = parameters(original)
    assert files.infos.keys() == expected.keys()
    for name, parameter in expected.items():
        assert files.infos[name].shape == tuple(parameter.shape)
        for start in (0, 1, len(parameter) // 2, len(parameter) - 1):
            rows = torch.full_like(parameter[start:], torch.nan).contiguous()
            files.read(name, start, rows)
            assert torch.equal(rows, parameter[start:]), (name, start)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts of a parameter, a few parts a file."""
    monkeypatch.setattr(megatron_writer, "PART_BYTES", 1000)
    monkeypatch.setattr(megatron_writer, "FILE_BYTES", 20_000)


# names


def test_layers_and_experts_are_leading_dimensions() -> None:
    [whole, apart] = stacks("decoder.layers.2.self_attention.linear_qkv.bias", DENSE)
    assert (whole.key, whole.index, whole.counts) == (
        "decoder.layers.self_attention.linear_qkv.bias",
        (2,),
        (3,),
    )
    assert (apart.key, apart.index) == ("decoder.layers.2.self_attention.linear_qkv.bias", ())
    expert = stacks("decoder.layers.2.mlp.experts.4.linear_fc1.weight", MOE)[0]
    assert (expert.key, expert.index, expert.counts) == (
        "decoder.layers.mlp.experts.experts.linear_fc1.weight",
        (2, 4),
        (3, 5),
    )
    [embedding] = stacks("embedding.word_embeddings.weight", DENSE)
    assert (embedding.key, embedding.index) == ("embedding.word_embeddings.weight", ())


def test_a_norm_is_where_transformer_engine_fuses_it() -> None:
    fused = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
    plain = "decoder.layers.pre_mlp_layernorm.weight"
    assert [stack.key for stack in stacks(NORM, DENSE)][:2] == [fused, plain]
    assert [stack.key for stack in written_stacks(NORM, DENSE)] == [fused]
    # with experts some of Megatron's specs look for it here, others there
    assert {stack.key for stack in written_stacks(NORM, MOE)} == {fused, plain}


def test_optimizer_and_states_are_no_parameters() -> None:
    keys = [
        "decoder.layers.mlp.linear_fc2.weight",
        "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight",
        "chained_0.optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight",
        "decoder.layers.mlp.linear_fc2._extra_state/shard_0_2",
        "rng_state/shard_0.0_1.1",
        "rerun_state_machine_state/shard_0_1",
        "common_state/shard_0_1",
    ]
    assert parameter_keys(keys) == {keys[0]}


# against torch.distributed.checkpoint


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_torch_reads_what_is_written(tmp_path: Path, model_type: str) -> None:
    original, out = save_model(tmp_path / "hf", model_type), tmp_path / "megatron"
    hf_to_megatron(original, out)
    assert len(list(out.glob("*.distcp"))) > 2
    metadata = FileSystemReader(out).read_metadata().state_dict_metadata
    keys = parameter_keys(metadata)
    assert any(len(metadata[key].chunks) > 2 * metadata[key].size[0] for key in keys)
    loaded = {key: torch.full(metadata[key].size, torch.nan) for key in keys}
    dcp.load(loaded, checkpoint_id=out, no_dist=True)
    sizes, seen = sizes_of(read_hf_config(original)), set()
    for name, parameter in parameters(original).items():
        for stack in written_stacks(name, sizes):
            assert torch.equal(loaded[stack.key][stack.index], parameter), name
            seen.add(stack.key)
    assert seen == keys
    assert not any(tensor.isnan().any() for tensor in loaded.values())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_own_checkpoints_are_read_back(tmp_path: Path, model_type: str) -> None:
    original, out = save_model(tmp_path / "hf", model_type), tmp_path / "megatron"
    hf_to_megatron(original, out)
    assert_holds(out, original)


def test_layers_that_were_saved_apart(tmp_path: Path) -> None:
    """Megatron's non_homogeneous_layers; another tool's plain tensors as well."""
    original, out = save_model(tmp_path / "hf", "qwen3"), tmp_path / "megatron"
    sizes = sizes_of(read_hf_config(original))
    by_key = {stacks(name, sizes)[-1].key: p for name, p in parameters(original).items()}
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in by_key
    dcp.save(by_key, checkpoint_id=out, no_dist=True)
    (out / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    assert_holds(out, original)


def test_a_part_that_is_a_view_of_a_larger_tensor(tmp_path: Path) -> None:
    """torch.save keeps the whole storage: the part begins where the view does."""
    original, out = save_model(tmp_path / "hf", "llama"), tmp_path / "megatron"
    sizes = sizes_of(read_hf_config(original))
    by_key = {
        stacks(name, sizes)[-1].key: torch.cat([torch.ones(3, *p.shape[1:]), p])[3:]
        for name, p in parameters(original).items()
    }
    dcp.save(by_key, checkpoint_id=out, no_dist=True)
    (out / "metadata.json").write_text("{}")
    assert_holds(out, original)


# damage


@pytest.mark.usefixtures("small_parts")
def test_a_parameter_with_a_hole_is_named(tmp_path: Path) -> None:
    original, out = save_model(tmp_path / "hf", "llama"), tmp_path / "megatron"
    hf_to_megatron(original, out)
    metadata = FileSystemReader(out).read_metadata()
    del metadata.state_dict_metadata["embedding.word_embeddings.weight"].chunks[1]
    (out / ".metadata").write_bytes(pickle.dumps(metadata))
    files = MegatronFiles(out, read_hf_config(original))
    with pytest.raises(ValueError, match=r"embedding.word_embeddings.weight is not whole \(\d+ of"):
        files.check()


@pytest.fixture
def little_memory() -> Iterator[None]:
    """What a damaged pickle may ask for is not all that the machine has."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("damaged", [".metadata", "__0_0.distcp"])
def test_no_damage_is_more_than_a_refusal(tmp_path: Path, damaged: str) -> None:
    """A changed byte is an error that names the file, or changes nothing but numbers."""
    original, out = save_model(tmp_path / "hf", "llama"), tmp_path / "megatron"
    hf_to_megatron(original, out)
    hf_config, file, rng = read_hf_config(original), out / damaged, random.Random(0)
    expected = parameters(original)
    content = file.read_bytes()
    num_refused = 0
    for _ in range(80):
        changed = bytearray(content)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        try:
            files = MegatronFiles(out, hf_config)
            found = {name: torch.full_like(p, torch.nan) for name, p in expected.items()}
            for name, rows in found.items():
                files.read(name, 0, rows)
        except ValueError as error:
            num_refused += str(out) in str(error)
        else:
            num_other = sum(int((rows != expected[n]).sum()) for n, rows in found.items())
            assert num_other <= (damaged == "__0_0.distcp")
    assert num_refused > 0
