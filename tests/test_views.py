"""Files under the other side's names, by rows: the same tensors as live models are given."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import save_model
from transformers import PretrainedConfig

from checkpoints_conversion.families import mappings_for, sizes_of
from checkpoints_conversion.hf_files import HFWeights, read_hf_config
from checkpoints_conversion.source import Source
from checkpoints_conversion.views import as_hf, as_megatron, only

MODEL_TYPES = ["qwen2", "qwen3", "llama", "mistral", "qwen3_moe", "mixtral"]


@pytest.fixture(scope="module", params=MODEL_TYPES)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[HFWeights, PretrainedConfig]:
    path = save_model(tmp_path_factory.mktemp(request.param), request.param)
    hf_config = read_hf_config(path)
    return HFWeights(path, hf_config), hf_config


def windows(num_rows: int) -> Iterator[tuple[int, int]]:
    """Some rows or all of them: across every border between runs, and beside it."""
    yield 0, num_rows
    for height in (1, 5, 24):
        for start in range(0, num_rows, height):
            yield start, min(start + height, num_rows)


def read(source: Source, name: str, start: int, stop: int) -> Tensor:
    info = source.infos[name]
    rows = torch.full((stop - start, *info.row_shape), torch.nan, dtype=info.dtype)
    source.read(name, start, rows)
    return rows


def test_megatron_parameters_are_what_a_whole_live_model_has(
    model: tuple[HFWeights, PretrainedConfig],
) -> None:
    weights, hf_config = model
    view, sizes = as_megatron(weights, hf_config), sizes_of(hf_config)
    live = {
        name: mapping.split([weights[hf_name] for hf_name in hf_names], 0, 1, sizes)
        for mapping in mappings_for(hf_config)
        for name, hf_names in mapping.names(sizes)
    }
    assert view.infos.keys() == live.keys()
    for name, parameter in live.items():
        assert view.infos[name].shape == tuple(parameter.shape)
        for start, stop in windows(len(parameter)):
            assert torch.equal(read(view, name, start, stop), parameter[start:stop]), name


def test_a_view_of_a_view_is_the_original(model: tuple[HFWeights, PretrainedConfig]) -> None:
    weights, hf_config = model
    view = as_hf(as_megatron(weights, hf_config), hf_config)
    assert dict(view.infos) == dict(weights.infos)
    for name, info in weights.infos.items():
        for start, stop in windows(info.shape[0]):
            assert torch.equal(read(view, name, start, stop), weights[name][start:stop]), name


def test_tensors_come_layer_by_layer(model: tuple[HFWeights, PretrainedConfig]) -> None:
    """As the original files have them, so that neither side is read or written to and fro."""
    weights, hf_config = model
    for names in (
        list(as_hf(as_megatron(weights, hf_config), hf_config).infos),
        list(as_megatron(weights, hf_config).infos),
    ):
        assert "embed" in names[0]
        layers = [int(name.split(".layers.")[1].split(".")[0]) for name in names[1:-2]]
        assert layers == sorted(layers)
        assert set(layers) == {0, 1}
        assert not any(".layers." in name for name in names[-2:])


def test_some_tensors_alone(model: tuple[HFWeights, PretrainedConfig]) -> None:
    weights, _ = model
    names = list(weights.infos)[2:4]
    view = only(weights, names)
    assert set(view.infos) == set(names)
    for name in names:
        assert torch.equal(read(view, name, 3, 9), weights[name][3:9])


def test_one_parameter_has_one_dtype(tmp_path: Path) -> None:
    path = save_model(tmp_path, "llama")
    tensors = load_file(path / "model.safetensors")
    key = "model.layers.1.self_attn.k_proj.weight"
    save_file(tensors | {key: tensors[key].bfloat16()}, path / "model.safetensors")
    hf_config = read_hf_config(path)
    with pytest.raises(ValueError, match=rf"{key}, .*v_proj.weight have different dtypes"):
        as_megatron(HFWeights(path, hf_config), hf_config)
