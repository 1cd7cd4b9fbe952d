"""Hugging Face tensors and Megatron shards: every mapping is undone by its inverse."""

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from checkpoints_conversion.families import mappings_for, sizes_of
from checkpoints_conversion.hf_files import expected_names, expected_shapes
from checkpoints_conversion.mapping import QKV, GateUp, Mapping, Replicated, Row, Sizes, Vocabulary

SIZES = Sizes(num_layers=2, num_heads=8, num_kv_heads=4, head_dim=6, vocab_size=67)
HIDDEN = 20
NUM_RANKS = [1, 2, 4]

MAPPINGS: dict[str, tuple[Mapping, list[tuple[int, ...]]]] = {
    "norm": (Replicated("m", ("a",)), [(HIDDEN,)]),
    "row": (Row("m", ("a",)), [(HIDDEN, 48)]),
    "vocabulary": (Vocabulary("m", ("a",)), [(67, HIDDEN)]),
    "gate and up": (GateUp("m", ("a", "b")), [(48, HIDDEN), (48, HIDDEN)]),
    "qkv weights": (QKV("m", ("q", "k", "v")), [(48, HIDDEN), (24, HIDDEN), (24, HIDDEN)]),
    "qkv biases": (QKV("m", ("q", "k", "v")), [(48,), (24,), (24,)]),
}


def random(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in shapes]


def split(mapping: Mapping, tensors: list[Tensor], num_ranks: int, sizes: Sizes) -> list[Tensor]:
    return [mapping.split(tensors, rank, num_ranks, sizes) for rank in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("kind", MAPPINGS)
def test_join_undoes_split(kind: str, num_ranks: int) -> None:
    mapping, shapes = MAPPINGS[kind]
    tensors = random(shapes)
    shards = split(mapping, tensors, num_ranks, SIZES)
    assert len({shard.shape for shard in shards}) == 1
    joined = mapping.join(shards, SIZES)
    assert len(joined) == len(tensors)
    for ours, original in zip(joined, tensors, strict=True):
        assert torch.equal(ours, original)


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("kind", sorted(set(MAPPINGS) - {"norm"}))
def test_every_number_is_on_one_rank(kind: str, num_ranks: int) -> None:
    mapping, shapes = MAPPINGS[kind]
    numbers = iter(range(1, 100_000))
    tensors = [
        torch.tensor([next(numbers) for _ in range(torch.Size(shape).numel())]).view(shape)
        for shape in shapes
    ]
    shards = torch.cat([shard.flatten() for shard in split(mapping, tensors, num_ranks, SIZES)])
    everything = torch.cat([tensor.flatten() for tensor in tensors])
    assert torch.equal(shards[shards > 0].sort().values, everything)  # 0 is padding


@pytest.mark.parametrize(("num_ranks", "rows"), [(1, 67), (2, 34), (4, 17)])
def test_padding_of_the_vocabulary_never_leaves(num_ranks: int, rows: int) -> None:
    mapping, shapes = MAPPINGS["vocabulary"]
    [embedding] = random(shapes)
    shards = split(mapping, [embedding], num_ranks, SIZES)
    assert [len(shard) for shard in shards] == [rows] * num_ranks
    assert not torch.cat(shards)[67:].any()
    trained = [shard + 1 for shard in shards]  # padded rows too, whatever is in them
    [joined] = mapping.join(trained, SIZES)
    assert torch.equal(joined, embedding + 1)


def test_qkv_lies_head_by_head() -> None:
    """Four heads of one number, two key-value heads, written out by hand."""
    sizes = Sizes(num_layers=1, num_heads=4, num_kv_heads=2, head_dim=1, vocab_size=1)
    qkv = QKV("m", ("q", "k", "v"))
    tensors = [torch.tensor(x) for x in ([1.0, 2.0, 3.0, 4.0], [10.0, 20.0], [100.0, 200.0])]
    whole = qkv.split(tensors, 0, 1, sizes)
    assert whole.tolist() == [1, 2, 10, 100, 3, 4, 20, 200]
    assert qkv.split(tensors, 0, 2, sizes).tolist() == [1, 2, 10, 100]
    assert qkv.split(tensors, 1, 2, sizes).tolist() == [3, 4, 20, 200]


def test_qkv_keeps_a_heads_rows_together() -> None:
    """Two heads of two rows, one key-value head each."""
    sizes = Sizes(num_layers=1, num_heads=2, num_kv_heads=2, head_dim=2, vocab_size=1)
    query = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    shard = QKV("m", ("q", "k", "v")).split([query, 10 * query, 100 * query], 1, 2, sizes)
    assert shard.flatten().tolist() == [3, 4, 30, 40, 300, 400]


def test_gate_rows_are_above_up_rows_on_every_rank() -> None:
    gate, up = torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0], [20.0]])
    mapping = GateUp("m", ("gate", "up"))
    assert mapping.split([gate, up], 1, 2, SIZES).flatten().tolist() == [2, 20]


def test_rows_are_split_by_their_inputs() -> None:
    shard = Row("m", ("a",)).split([torch.tensor([[1.0, 2.0], [3.0, 4.0]])], 1, 2, SIZES)
    assert shard.tolist() == [[2], [4]]


@pytest.mark.parametrize("tied", [False, True])
def test_the_name_table_is_transformers_own_model(tied: bool) -> None:
    """No tensor of the model is left out, none is there twice, and the sizes are its own."""
    config = Qwen2Config(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        architectures=["Qwen2ForCausalLM"],
    )
    parameters = dict(Qwen2ForCausalLM(config).named_parameters())  # tied ones once
    names = expected_names(config)
    assert len(names) == len(set(names))
    assert set(names) == set(parameters)
    shapes = expected_shapes(config)
    assert shapes == {name: tuple(parameters[name].shape) for name in names}
    sizes = sizes_of(config)
    assert (sizes.num_layers, sizes.head_dim, sizes.vocab_size) == (3, 8, 67)
    assert len(mappings_for(config)) == (9 if tied else 10)


def test_an_architecture_without_table_is_refused() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM; supported architectures: Qwen2"):
        mappings_for(Qwen2Config(architectures=["LlamaForCausalLM"]))
