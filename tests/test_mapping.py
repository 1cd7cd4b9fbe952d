"""Hugging Face tensors and Megatron shards: every mapping is undone by its inverse."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from toys import save_model
from transformers import Qwen2Config

from checkpoints_conversion.families import FAMILIES, mappings_for, sizes_of
from checkpoints_conversion.hf_files import expected_shapes, read_hf_config
from checkpoints_conversion.mapping import (
    QKV,
    GateUp,
    Mapping,
    Replicated,
    Row,
    Sizes,
    Vocabulary,
    tops,
)

SIZES = Sizes(num_layers=2, num_heads=8, num_kv_heads=4, head_dim=6, vocab=67, hidden=20, ffn=48)
NUM_RANKS = [1, 2, 4]
QUERY_KEY_VALUE = ("queries", "keys", "keys")
MAPPINGS: dict[str, Mapping] = {
    "norm": Replicated("m", ("a",), (("hidden",),)),
    "row": Row("m", ("a",), (("hidden", "ffn"),)),
    "vocabulary": Vocabulary("m", ("a",), (("vocab", "hidden"),)),
    "gate and up": GateUp("m", ("a", "b"), (("ffn", "hidden"),) * 2),
    "qkv weights": QKV("m", ("q", "k", "v"), tuple((w, "hidden") for w in QUERY_KEY_VALUE)),
    "qkv biases": QKV("m", ("q", "k", "v"), tuple((w,) for w in QUERY_KEY_VALUE)),
}
MODEL_TYPES = ["qwen2", "qwen3", "llama", "mistral", "qwen3_moe", "mixtral"]


def random(mapping: Mapping, sizes: Sizes = SIZES) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in mapping.hf_shapes(sizes)]


def split(mapping: Mapping, tensors: list[Tensor], num_ranks: int, sizes: Sizes) -> list[Tensor]:
    return [mapping.split(tensors, rank, num_ranks, sizes) for rank in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("kind", MAPPINGS)
def test_join_undoes_split(kind: str, num_ranks: int) -> None:
    mapping = MAPPINGS[kind]
    tensors = random(mapping)
    shards = split(mapping, tensors, num_ranks, SIZES)
    assert len({shard.shape for shard in shards}) == 1
    joined = mapping.join(shards, SIZES)
    assert len(joined) == len(tensors)
    for ours, original in zip(joined, tensors, strict=True):
        assert torch.equal(ours, original)


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("kind", sorted(set(MAPPINGS) - {"norm"}))
def test_every_number_is_on_one_rank(kind: str, num_ranks: int) -> None:
    mapping = MAPPINGS[kind]
    numbers = iter(range(1, 100_000))
    tensors = [
        torch.tensor([next(numbers) for _ in range(torch.Size(shape).numel())]).view(shape)
        for shape in mapping.hf_shapes(SIZES)
    ]
    shards = torch.cat([shard.flatten() for shard in split(mapping, tensors, num_ranks, SIZES)])
    everything = torch.cat([tensor.flatten() for tensor in tensors])
    assert torch.equal(shards[shards > 0].sort().values, everything)  # 0 is padding


@pytest.mark.parametrize(("num_ranks", "rows"), [(1, 67), (2, 34), (4, 17)])
def test_padding_of_the_vocabulary_never_leaves(num_ranks: int, rows: int) -> None:
    mapping = MAPPINGS["vocabulary"]
    [embedding] = random(mapping)
    shards = split(mapping, [embedding], num_ranks, SIZES)
    assert [len(shard) for shard in shards] == [rows] * num_ranks
    assert not torch.cat(shards)[67:].any()
    trained = [shard + 1 for shard in shards]  # padded rows too, whatever is in them
    [joined] = mapping.join(trained, SIZES)
    assert torch.equal(joined, embedding + 1)


def sizes_of_heads(num_heads: int, num_kv_heads: int, head_dim: int) -> Sizes:
    return Sizes(
        num_layers=1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab=1,
        hidden=1,
        ffn=1,
    )


def test_qkv_lies_head_by_head() -> None:
    """Four heads of one number, two key-value heads, written out by hand."""
    sizes, qkv = sizes_of_heads(4, 2, 1), MAPPINGS["qkv biases"]
    tensors = [torch.tensor(x) for x in ([1.0, 2.0, 3.0, 4.0], [10.0, 20.0], [100.0, 200.0])]
    whole = qkv.split(tensors, 0, 1, sizes)
    assert whole.tolist() == [1, 2, 10, 100, 3, 4, 20, 200]
    assert qkv.split(tensors, 0, 2, sizes).tolist() == [1, 2, 10, 100]
    assert qkv.split(tensors, 1, 2, sizes).tolist() == [3, 4, 20, 200]


def test_qkv_keeps_a_heads_rows_together() -> None:
    """Two heads of two rows, one key-value head each."""
    sizes = sizes_of_heads(2, 2, 2)
    query = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    shard = MAPPINGS["qkv weights"].split([query, 10 * query, 100 * query], 1, 2, sizes)
    assert shard.flatten().tolist() == [3, 4, 30, 40, 300, 400]


def test_gate_rows_are_above_up_rows_on_every_rank() -> None:
    gate, up = torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0], [20.0]])
    assert MAPPINGS["gate and up"].split([gate, up], 1, 2, SIZES).flatten().tolist() == [2, 20]


def test_rows_are_split_by_their_inputs() -> None:
    shard = MAPPINGS["row"].split([torch.tensor([[1.0, 2.0], [3.0, 4.0]])], 1, 2, SIZES)
    assert shard.tolist() == [[2], [4]]


# the families' tables


def table(model_type: str, tmp_path: Path, tied: bool = False) -> tuple[tuple[Mapping, ...], Sizes]:
    hf_config = read_hf_config(save_model(tmp_path, model_type, tied=tied))
    return mappings_for(hf_config), sizes_of(hf_config)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_files_and_live_models_agree_on_the_order_of_rows(model_type: str, tmp_path: Path) -> None:
    mappings, sizes = table(model_type, tmp_path)
    for mapping in mappings:
        tensors, runs = random(mapping, sizes), mapping.runs(sizes)
        rows = [tensors[run.source][run.start : run.stop] for run in runs]
        live = mapping.split(tensors, 0, 1, sizes)
        assert torch.equal(torch.cat(rows), live), mapping.megatron
        assert tuple(live.shape) == mapping.megatron_shape(sizes)
        for top, part in zip(tops(runs), rows, strict=True):
            assert torch.equal(live[top : top + len(part)], part), mapping.megatron


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_table_names_what_transformers_saves(model_type: str, tied: bool, tmp_path: Path) -> None:
    """No tensor of the model is left out, none is there twice, and the shapes are its own."""
    path = save_model(tmp_path, model_type, tied=tied)
    with safe_open(path / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    hf_config = read_hf_config(path)
    assert expected_shapes(hf_config) == saved
    assert ("lm_head.weight" in saved) != tied
    sizes = sizes_of(hf_config)
    pairs = [pair for mapping in mappings_for(hf_config) for pair in mapping.names(sizes)]
    hf_names = [name for _, names in pairs for name in names]
    assert len(hf_names) == len(set(hf_names)) == len(saved)
    assert len(pairs) == len({megatron for megatron, _ in pairs})


def test_every_layer_and_every_expert_has_names_of_its_own(tmp_path: Path) -> None:
    mappings, sizes = table("mixtral", tmp_path)
    [fc1] = [m for m in mappings if m.megatron.endswith("{expert}.linear_fc1.weight")]
    names = list(fc1.names(sizes))
    assert len(names) == sizes.num_layers * sizes.num_experts == 8
    assert names[5] == (
        "decoder.layers.1.mlp.experts.1.linear_fc1.weight",
        (
            "model.layers.1.block_sparse_moe.experts.1.w1.weight",
            "model.layers.1.block_sparse_moe.experts.1.w3.weight",
        ),
    )


def test_sizes_are_the_configurations(tmp_path: Path) -> None:
    _, sizes = table("qwen3_moe", tmp_path)
    assert (sizes.num_heads, sizes.num_kv_heads, sizes.head_dim) == (4, 2, 16)  # not 32 / 4
    assert (sizes.num_experts, sizes.ffn, sizes.vocab, sizes.hidden) == (4, 24, 67, 32)
    _, sizes = table("llama", tmp_path)
    assert (sizes.head_dim, sizes.ffn, sizes.num_experts) == (8, 48, 0)


def test_an_architecture_without_table_is_refused() -> None:
    supported = ", ".join(FAMILIES)
    assert supported.startswith("Qwen2ForCausalLM, Qwen3ForCausalLM, LlamaForCausalLM, Mistral")
    with pytest.raises(ValueError, match=f"PhiForCausalLM; supported architectures: {supported}"):
        mappings_for(Qwen2Config(architectures=["PhiForCausalLM"]))
