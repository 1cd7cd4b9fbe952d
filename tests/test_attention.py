"""Attention over packed rows against softmax attention, one sequence and one head at a time."""

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_nft.policy import attention
from megatron_nft.policy.attention import PackedAttention
from megatron_nft.policy.packed_row import PackedRow, cells_of, pack_row

HEAD_DIM = 16
THETA = 10000.0
CPU = torch.device("cpu")
LENGTHS = {
    "unequal": (5, 1, 33, 8, 7, 12, 2, 33, 20),
    "one sequence": (19,),
    "equal": (6, 6, 6),
    "single tokens": (1, 1, 1),
}


def _attention(num_heads: int, num_groups: int) -> PackedAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=num_heads * HEAD_DIM,
        num_attention_heads=num_heads,
        num_query_groups=num_groups,
    )
    inv_freq = 1.0 / THETA ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return PackedAttention(config, 1, AttnMaskType.causal, "self", inv_freq=inv_freq)


def _rotated(x: Tensor) -> Tensor:
    """Rope on x [T, D]: the pair (x_i, x_{i+D/2}) as a complex number, turned by t·θ^(−2i/D)."""
    half = HEAD_DIM // 2
    pairs = torch.complex(x[:, :half], x[:, half:])
    angles = torch.outer(
        torch.arange(len(x), dtype=torch.float64),
        THETA ** (-torch.arange(half, dtype=torch.float64) / half),
    )
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def _oracle(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Causal softmax attention [T, H·D] in float64; head h reads key and value head h // (H/KV)."""
    rows = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        heads = []
        for head in range(q.shape[1]):
            group = head * k.shape[1] // q.shape[1]
            scores = _rotated(q[:, head]) @ _rotated(k[:, group]).T / HEAD_DIM**0.5
            heads.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, group])
        rows.append(torch.cat(heads, dim=-1))
    return torch.cat(rows)


def _error(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize(("num_heads", "num_groups"), [(4, 4), (4, 2), (6, 1)])
def test_equals_softmax_attention_of_each_sequence(
    name: str, num_heads: int, num_groups: int
) -> None:
    lengths = LENGTHS[name]
    rng = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(sum(lengths), heads, HEAD_DIM, generator=rng)
        for heads in (num_heads, num_groups, num_groups)
    ]
    grad = torch.randn(sum(lengths), num_heads * HEAD_DIM, generator=rng)
    ours = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]

    out = _attention(num_heads, num_groups)(*ours, packed_seq_params=pack_row(lengths, CPU))
    expected = _oracle(*exact, lengths)
    out.backward(grad)
    expected.backward(grad.double())

    assert _error(out, expected) <= 1e-6
    scale = max(float(x.grad.norm()) for x in exact)  # of one token's query: exactly zero
    for a, b in zip(ours, exact, strict=True):
        assert float((a.grad.double() - b.grad).norm()) <= 1e-6 * scale


def _shared_outputs(
    monkeypatch: pytest.MonkeyPatch,
    inputs: list[Tensor],
    lengths: tuple[int, ...],
    num_ranks: int,
) -> Tensor:
    """What all context-parallel ranks make of their shares, put together as the whole row.

    The gathering, which is Megatron's, is done by hand: rotated keys and values, rank by rank.
    """
    query, key, value = inputs
    module = _attention(query.shape[1], key.shape[1])
    module.is_shared = True
    rows = [pack_row(lengths, CPU, rank, num_ranks) for rank in range(num_ranks)]
    keys = [
        attention._rotate(key[row.tokens], *module._rope(row.positions, key.dtype)) for row in rows
    ]
    values = [value[row.tokens] for row in rows]
    monkeypatch.setattr(attention, "_gather", lambda *_: (torch.cat(keys), torch.cat(values)))
    outputs = [
        module(query[row.tokens], key[row.tokens], value[row.tokens], packed_seq_params=row)
        for row in rows
    ]
    order = torch.cat([row.tokens for row in rows])
    return torch.cat(outputs)[torch.argsort(order)]


SHARED_LENGTHS = {"unequal": (16, 48, 8, 8, 112, 24), "one sequence": (64,), "equal": (8, 8, 8)}


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", SHARED_LENGTHS)
@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
def test_context_parallel_ranks_together_equal_softmax_attention(
    monkeypatch: pytest.MonkeyPatch, name: str, num_ranks: int, kernel: str
) -> None:
    lengths = SHARED_LENGTHS[name]
    if kernel == "varlen":
        _use_varlen(monkeypatch)
    rng = torch.Generator().manual_seed(0)
    inputs = [torch.randn(sum(lengths), heads, HEAD_DIM, generator=rng) for heads in (4, 2, 2)]
    grad = torch.randn(sum(lengths), 4 * HEAD_DIM, generator=rng)
    ours = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    out = _shared_outputs(monkeypatch, ours, lengths, num_ranks)
    expected = _oracle(*exact, lengths)
    out.backward(grad)
    expected.backward(grad.double())
    assert _error(out, expected) <= 1e-6
    for a, b in zip(ours, exact, strict=True):
        assert _error(a.grad, b.grad) <= 1e-6


def _use_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the path of a GPU, with its kernel's semantics in plain torch."""
    monkeypatch.setattr(
        PackedAttention,
        "_attend_cells",
        lambda self, q, k, v, row: self._attend_varlen(q, k, v, row),
    )
    monkeypatch.setattr(attention.varlen, "varlen_attn", _varlen_attn)


def _varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """torch's documented semantics: causal from the lower right corner, heads in groups."""
    assert enable_gqa
    assert window_size == (-1, 0)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    scale = scale or query.shape[-1] ** -0.5
    repeats = query.shape[1] // key.shape[1]
    outputs = []
    for q, k, v in zip(
        query.split(cu_seq_q.diff().tolist()),
        key.split(cu_seq_k.diff().tolist()),
        value.split(cu_seq_k.diff().tolist()),
        strict=True,
    ):
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(1 + len(k) - len(q))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


@pytest.mark.parametrize("name", LENGTHS)
def test_the_gpus_kernel_is_given_the_same_sequences(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    lengths = LENGTHS[name]
    rng = torch.Generator().manual_seed(0)
    inputs = [torch.randn(sum(lengths), heads, HEAD_DIM, generator=rng) for heads in (4, 2, 2)]
    _use_varlen(monkeypatch)
    out = _attention(4, 2)(*inputs, packed_seq_params=pack_row(lengths, CPU))
    assert _error(out, _oracle(*(x.double() for x in inputs), lengths)) <= 1e-6


def test_layers_share_one_rope() -> None:
    row = pack_row((3, 4), CPU)
    x = torch.randn(7, 2, HEAD_DIM)
    first = _attention(2, 2)(x, x, x, packed_seq_params=row)
    rope = row.rope
    second = _attention(2, 2)(x, x, x, packed_seq_params=row)
    assert row.rope is rope
    assert torch.equal(first, second)


def test_a_row_that_is_not_packed_is_refused() -> None:
    x = torch.randn(7, 2, HEAD_DIM)
    with pytest.raises(AssertionError, match="always packed"):
        _attention(2, 2)(x, x, x)


def _random_rows() -> list[PackedRow]:
    rng = torch.Generator().manual_seed(0)
    counts = (1, 2, 7, 40, 100)
    lengths = [torch.randint(1, 300, (n,), generator=rng).tolist() for n in counts]
    return [pack_row(tuple(x), CPU) for x in (*lengths, *map(list, LENGTHS.values()))]


def _shares() -> list[tuple[PackedRow, int, int]]:
    """Rows of every number of context-parallel ranks, with rank and number of ranks."""
    rng = torch.Generator().manual_seed(0)
    counts = (1, 2, 7, 40)
    lengths = [(16 * torch.randint(1, 20, (n,), generator=rng)).tolist() for n in counts]
    return [
        (pack_row(tuple(x), CPU, rank, num_ranks), rank, num_ranks)
        for x in lengths
        for num_ranks in (2, 4, 8)
        for rank in range(num_ranks)
    ]


def test_buckets_hold_every_token_once() -> None:
    for row in [*_random_rows(), *(row for row, _, _ in _shares())]:
        num_tokens = len(row.positions)
        cells = cells_of(row)
        tokens = torch.cat([bucket.queries.flatten() for bucket in cells.buckets])
        assert torch.equal(tokens[cells.scatter], torch.arange(num_tokens))
        assert len(cells.scatter.unique()) == num_tokens


def test_a_bucket_row_is_one_sequence_and_less_than_a_third_is_padding() -> None:
    for row in _random_rows():
        ends = row.cu_seqlens_q[1:].tolist()
        starts = row.cu_seqlens_q[:-1].tolist()
        buckets = cells_of(row).buckets
        assert sum(len(bucket.keys) for bucket in buckets) == len(starts)
        for bucket in buckets:
            assert bucket.mask is None
            assert torch.equal(bucket.queries, bucket.keys)
            num_real, length = 0, bucket.keys.shape[1]
            for cells in bucket.keys.tolist():
                end = ends[starts.index(cells[0])]
                own = list(range(cells[0], end))
                assert cells == own + [end - 1] * (length - len(own))
                num_real += len(own)
            assert 3 * (bucket.keys.numel() - num_real) < bucket.keys.numel()


def test_context_parallel_ranks_have_equal_work() -> None:
    """Equal tokens, and equal pairs of a query and a key that it sees."""
    lengths = (32, 16, 48)
    pairs = set()
    for rank in range(4):
        row = pack_row(lengths, CPU, rank, 4)
        assert len(row.positions) == sum(lengths) // 4
        pairs.add(int((row.positions + 1).sum()))
    assert len(pairs) == 1


def test_a_row_says_where_its_sequences_lie() -> None:
    row = pack_row((2, 3, 1), CPU)
    assert row.qkv_format == "thd"
    assert row.cu_seqlens_q.tolist() == row.cu_seqlens_kv.tolist() == [0, 2, 5, 6]
    assert row.cu_seqlens_q.dtype == torch.int32
    assert row.max_seqlen_q == row.max_seqlen_kv == 3
    assert row.positions.tolist() == [0, 1, 0, 1, 2, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels are a GPU's")
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_it_equals_softmax_attention_of_each_sequence(
    dtype: torch.dtype, name: str
) -> None:
    """bf16 rounds cosines and sines, what they turn, probabilities and outputs: half a unit each.

    Scores of standard deviation one go into the exponent; queries and keys have two roundings.
    """
    lengths, device = LENGTHS[name], torch.device("cuda")
    rng = torch.Generator().manual_seed(0)
    inputs = [torch.randn(sum(lengths), heads, HEAD_DIM, generator=rng) for heads in (4, 2, 2)]
    ours = [x.to(device, dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().cpu().requires_grad_() for x in ours]
    grad = torch.randn(sum(lengths), 4 * HEAD_DIM, generator=rng).to(device, dtype)
    out = _attention(4, 2).to(device)(*ours, packed_seq_params=pack_row(lengths, device))
    expected = _oracle(*exact, lengths)
    out.backward(grad)
    expected.backward(grad.double().cpu())
    tolerance = 2e-6 if dtype == torch.float32 else 6 * 2.0**-8
    assert _error(out.cpu(), expected) <= tolerance
    scale = max(float(x.grad.norm()) for x in exact)  # of one token's query: exactly zero
    for a, b in zip(ours, exact, strict=True):
        assert float((a.grad.double().cpu() - b.grad).norm()) <= tolerance * scale
