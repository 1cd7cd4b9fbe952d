"""Log-probabilities through vocabulary shards against float64 log_softmax over the whole head."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from processes import run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_nft.config import ParallelConfig
from megatron_nft.policy import host, logprobs, parallel, softmax_kernels

HIDDEN_SIZE = 48
DEVICE = host.device()


@dataclass(frozen=True)
class Case:
    """Inputs, made from a seed, and the relative error (by norm) that their dtype allows."""

    num_tokens: int = 37
    num_rows: int = 120  # of the head, padding included
    vocab_size: int = 120
    temperature: float = 1.0
    logit_scale: float = 2.0
    chunk_cells: int = 2**25
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-6

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden [T, H], weight [V, H], targets [T] and the tokens' factors in the loss [T]."""
        rng = torch.Generator().manual_seed(0)
        hidden = torch.randn(self.num_tokens, HIDDEN_SIZE, generator=rng)
        weight = torch.randn(self.num_rows, HIDDEN_SIZE, generator=rng)
        weight *= self.logit_scale / HIDDEN_SIZE**0.5
        targets = torch.randint(self.vocab_size, (self.num_tokens,), generator=rng)
        factors = torch.randn(self.num_tokens, generator=rng)
        hidden, weight = hidden.to(self.dtype), weight.to(self.dtype)
        return tuple(x.to(DEVICE) for x in (hidden, weight, targets, factors))


CASES = {
    "plain": Case(),
    "temperature": Case(temperature=0.6),
    "hot": Case(temperature=1.7),
    "padding": Case(vocab_size=111),
    "a shard of padding alone": Case(vocab_size=50),
    "one token a chunk": Case(chunk_cells=1, temperature=0.8, vocab_size=117),
    "chunks of unequal size": Case(chunk_cells=120 * 5, temperature=0.8, vocab_size=117),
    "one token": Case(num_tokens=1),
    "no token": Case(num_tokens=0),
    "logits in the hundreds": Case(logit_scale=100.0, tolerance=1e-4),
    "bfloat16": Case(dtype=torch.bfloat16, temperature=0.9, vocab_size=117, tolerance=1e-2),
}
NAMES = ("logp", "entropy", "grad_hidden", "grad_weight")
PLAIN = CASES["plain"]


@dataclass(frozen=True)
class Path:
    """How the gradients come about."""

    is_promised: bool
    has_main_grad: bool

    def __str__(self) -> str:
        ways = ("recomputed", "promised")[self.is_promised], ("grad", "main_grad")
        return f"{ways[0]} {ways[1][self.has_main_grad]}"


PATHS = [Path(promised, main_grad) for promised in (False, True) for main_grad in (False, True)]


def _loss(logp: Tensor, factors: Tensor) -> Tensor:
    return (factors * logp + logp**2 / 20).sum()


def _gradient(logp: Tensor, factors: Tensor) -> Tensor:
    return factors + logp / 10


@cache
def _oracle(case: Case) -> tuple[Tensor, ...]:
    """What `NAMES` says, in float64 and by autograd, over the model's own vocabulary."""
    hidden, weight, targets, factors = case.inputs()
    hidden = hidden.double().requires_grad_()
    weight = weight.double().requires_grad_()
    logits = hidden @ weight[: case.vocab_size].T / case.temperature
    all_logp = logits.log_softmax(-1)
    logp = all_logp.gather(1, targets[:, None])[:, 0]
    _loss(logp, factors.double()).backward()
    entropy = -(all_logp.exp() * all_logp).sum(-1)
    return logp.detach(), entropy.detach(), hidden.grad, weight.grad


def _leaves(case: Case, has_main_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The case's inputs with this rank's rows of the head, as a model's parameters have them."""
    hidden, weight, targets, factors = case.inputs()
    group = parallel_state.get_tensor_model_parallel_group()
    shard = weight.chunk(group.size())[group.rank()].clone().requires_grad_()
    if has_main_grad:
        shard.main_grad = torch.zeros(shard.shape, device=DEVICE)
    return hidden.requires_grad_(), shard, targets, factors


def _call(case: Case, hidden: Tensor, shard: Tensor, targets: Tensor, **options: Any) -> Any:
    group = parallel_state.get_tensor_model_parallel_group()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "CHUNK_CELLS", case.chunk_cells)
        return logprobs.token_logprobs(
            copy_to_tensor_model_parallel_region(hidden, group),
            shard,
            targets,
            temperature=case.temperature,
            vocab_size=case.vocab_size,
            **options,
        )


def _step(
    case: Case, path: Path, leaves: tuple[Tensor, ...], with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Forward and backward of `_loss`."""
    *inputs, factors = leaves
    promise = (lambda logp, rows: _gradient(logp, factors[rows])) if path.is_promised else None
    logp, entropy = _call(case, *inputs, with_entropy=with_entropy, gradient=promise)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "CHUNK_CELLS", case.chunk_cells)
        _loss(logp, factors).backward()
    return logp.detach(), entropy


def _ours(case: Case, path: Path) -> tuple[Tensor, ...]:
    """What `NAMES` says, of this rank: its own rows of the head in grad_weight."""
    leaves = hidden, shard, *_ = _leaves(case, path.has_main_grad)
    logp, entropy = _step(case, path, leaves, with_entropy=True)
    assert logp.dtype == entropy.dtype == torch.float32
    assert not entropy.requires_grad
    assert hidden.grad.dtype == case.dtype
    if path.has_main_grad:
        assert shard.grad is None
        return logp, entropy, hidden.grad, shard.main_grad
    assert shard.grad.dtype == case.dtype
    return logp, entropy, hidden.grad, shard.grad


def _error(ours: Tensor, expected: Tensor) -> float:
    """‖ours − expected‖ / ‖expected‖."""
    assert ours.shape == expected.shape
    expected = expected.double().to(ours.device)
    return float((ours.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def _compare(case: Case, ours: tuple[Tensor, ...]) -> None:
    for name, value, expected in zip(NAMES, ours, _oracle(case), strict=True):
        assert _error(value, expected) <= case.tolerance, name
    assert not ours[3][case.vocab_size :].any(), "padding has a gradient"


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """Megatron's groups over this process alone."""
    dist.init_process_group(host.backend(), store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel.finalize()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_log_softmax_at_tp1(name: str, path: Path) -> None:
    _compare(CASES[name], _ours(CASES[name], path))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_memory_held_before_reaches_no_gradient(path: Path, dtype: torch.dtype) -> None:
    """torch's deterministic mode fills fresh memory with NaN; the vocabulary is padded here."""
    case = replace(CASES["bfloat16"], dtype=dtype)
    assert case.vocab_size < case.num_rows
    torch.use_deterministic_algorithms(True)
    try:
        fresh = torch.empty(3, device=DEVICE)
        assert fresh.isnan().all(), "this test needs fresh memory to be NaN"
        _compare(case, _ours(case, path))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_one_minus_a_probability_near_one_is_rounded_to_bfloat16_last(path: Path) -> None:
    """1 − p rounded, not 1 minus p rounded; logits, 10 and 0, are exact here."""
    case = replace(PLAIN, num_tokens=HIDDEN_SIZE, dtype=torch.bfloat16)
    _, shard, targets, factors = _leaves(case, path.has_main_grad)
    hidden = torch.eye(HIDDEN_SIZE, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    ten = torch.tensor(10.0, dtype=torch.bfloat16, device=DEVICE)
    shard.data = torch.zeros_like(shard).index_put_(
        (targets, torch.arange(HIDDEN_SIZE, device=DEVICE)), ten
    )
    logp, _ = _step(case, path, (hidden, shard, targets, factors))
    probability = 1.0 / (1.0 + (case.num_rows - 1) * np.exp(-10.0))
    slope = factors.double() + np.log(probability) / 10
    # of a token's own hidden unit: its target's weight is 10, all other tokens' there are zero
    expected = slope * (1.0 - probability) * 10.0
    assert _error(logp, torch.full_like(slope, np.log(probability))) <= 1e-4
    assert _error(hidden.grad.diagonal(), expected) <= 5e-3


@pytest.mark.usefixtures("alone")
@pytest.mark.skipif(not host.has_cuda(), reason="bf16 products into float32 are a GPU's")
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_bfloat16_rounds_what_it_must_and_nothing_else(path: Path) -> None:
    """Each number within what its own roundings allow.

    Of the logits' gradient G and of hidden's, to bf16, half a unit each; all else is float32, whose
    products of H terms are off by at most H units of the terms' sizes.
    """
    case = replace(PLAIN, num_tokens=500, num_rows=20_000, vocab_size=19_999, temperature=0.8)
    case = replace(case, dtype=torch.bfloat16, chunk_cells=20_000 * 200)
    hidden, weight, targets, factors = (x.double() for x in case.inputs())
    weight, rows = weight[: case.vocab_size], torch.arange(len(hidden), device=DEVICE)
    all_logp = (hidden @ weight.T / case.temperature).log_softmax(-1)
    logp = all_logp[rows, targets.long()]
    slope = _gradient(logp, factors)[:, None] / case.temperature
    grad = -slope * all_logp.exp()
    grad[rows, targets.long()] += slope[:, 0]

    unit, fine = 2.0**-8, 2.0**-24
    sizes = hidden.abs() @ weight.abs().T / case.temperature
    off_logp = 2 * HIDDEN_SIZE * fine * sizes.amax(1) + 32 * fine * (1 + logp.abs())
    off_grad = unit * grad.abs() + 4 * off_logp[:, None] * (slope.abs() + grad.abs() + 1)
    off_hidden = off_grad @ weight.abs() + unit * (grad @ weight).abs()
    off_weight = off_grad.T @ hidden.abs()
    ours = _ours(case, path)
    assert ((ours[0] - logp).abs() <= off_logp).all()
    assert ((ours[2] - grad @ weight).abs() <= 1.01 * off_hidden).all()
    of_weight = ours[3][: case.vocab_size] - grad.T @ hidden
    rounded = 0 if path.has_main_grad else unit * (grad.T @ hidden).abs()
    assert (of_weight.abs() <= 1.01 * (off_weight + rounded)).all()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_entropy_only_when_asked(path: Path) -> None:
    plain, none = _step(PLAIN, path, _leaves(PLAIN, path.has_main_grad))
    assert none is None
    assert torch.equal(plain, _ours(PLAIN, path)[0])


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_one_gradient_alone(path: Path, wanted: str) -> None:
    leaves = hidden, shard, *_ = _leaves(PLAIN, path.has_main_grad)
    unwanted = shard if wanted == "hidden" else hidden
    unwanted.requires_grad_(False)
    _step(PLAIN, path, leaves)
    assert unwanted.grad is None
    of_shard = shard.main_grad if path.has_main_grad else shard.grad
    if wanted == "hidden":
        assert _error(hidden.grad, _oracle(PLAIN)[2]) <= PLAIN.tolerance
        assert of_shard is None or not of_shard.any()
    else:
        assert _error(of_shard, _oracle(PLAIN)[3]) <= PLAIN.tolerance


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_gradients_add_up_over_calls(path: Path) -> None:
    leaves = hidden, shard, *_ = _leaves(PLAIN, path.has_main_grad)
    for _ in range(2):
        _step(PLAIN, path, leaves)
    of_shard = shard.main_grad if path.has_main_grad else shard.grad
    assert _error(hidden.grad, 2 * _oracle(PLAIN)[2]) <= PLAIN.tolerance
    assert _error(of_shard, 2 * _oracle(PLAIN)[3]) <= PLAIN.tolerance


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("is_promised", [False, True])
def test_another_use_of_the_weight_has_its_ordinary_gradient(is_promised: bool) -> None:
    *inputs, factors = leaves = _leaves(PLAIN, has_main_grad=True)
    shard = leaves[1]
    promise = (lambda logp, rows: _gradient(logp, factors[rows])) if is_promised else None
    logp, _ = _call(PLAIN, *inputs, gradient=promise)
    (_loss(logp, factors) + 3.0 * shard.sum()).backward()
    assert torch.equal(shard.grad, torch.full_like(shard, 3.0))
    assert _error(shard.main_grad, _oracle(PLAIN)[3]) <= PLAIN.tolerance


def _wrong_scale(gradient: Tensor) -> Tensor:
    return gradient * 1.01


def _one_token_off(gradient: Tensor) -> Tensor:
    return gradient.index_fill(0, torch.tensor([3], device=DEVICE), 0.0)


def _one_nan(gradient: Tensor) -> Tensor:
    return gradient.index_fill(0, torch.tensor([3], device=DEVICE), torch.nan)


def _swapped(gradient: Tensor) -> Tensor:
    return gradient.flip(0)


@pytest.mark.usefixtures("alone")
@pytest.mark.skipif(host.has_cuda(), reason="an assertion on a GPU ends the process")
@pytest.mark.parametrize("broken", [_wrong_scale, _one_token_off, _one_nan, _swapped])
def test_a_broken_promise_raises(broken: Any) -> None:
    *inputs, factors = _leaves(PLAIN, has_main_grad=False)
    logp, _ = _call(PLAIN, *inputs, gradient=lambda logp, rows: broken(factors[rows]))
    with pytest.raises(RuntimeError, match="promised"):
        logp.backward(factors)


@pytest.mark.usefixtures("alone")
def test_a_promised_nan_is_the_callers_to_find() -> None:
    hidden, shard, targets, factors = _leaves(PLAIN, has_main_grad=False)
    factors = _one_nan(factors)
    logp, _ = _call(PLAIN, hidden, shard, targets, gradient=lambda _, rows: factors[rows])
    logp.backward(factors)
    assert hidden.grad[3].isnan().all()
    assert not hidden.grad[4].isnan().any()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("context", [torch.no_grad, nullcontext])
def test_without_grad_mode_nothing_is_touched(context: type[AbstractContextManager]) -> None:
    hidden, shard, targets, _ = _leaves(PLAIN, has_main_grad=True)
    if context is nullcontext:
        hidden.requires_grad_(False)
        shard.requires_grad_(False)
    with context():
        logp, entropy = _call(
            PLAIN, hidden, shard, targets, with_entropy=True, gradient=pytest.fail
        )
    assert not logp.requires_grad
    assert not shard.main_grad.any()
    assert _error(logp, _oracle(PLAIN)[0]) <= PLAIN.tolerance
    assert _error(entropy, _oracle(PLAIN)[1]) <= PLAIN.tolerance


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("name", ["chunks of unequal size", "plain"])
def test_number_of_matmuls(name: str, path: Path) -> None:
    case = replace(CASES[name], vocab_size=120)
    one = 2 * case.num_tokens * case.num_rows * HIDDEN_SIZE
    leaves = _leaves(case, path.has_main_grad)
    with FlopCounterMode(display=False) as counter:
        _step(case, path, leaves, with_entropy=True)
    assert counter.get_total_flops() == (3 if path.is_promised else 4) * one
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _call(case, *leaves[:3])
    assert counter.get_total_flops() == one


class _LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor that any operation returned."""

    num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.num_bytes = max(self.num_bytes, out.nbytes)
        return out


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_is_larger_than_a_chunk(path: Path, dtype: torch.dtype) -> None:
    case = replace(PLAIN, num_tokens=100, dtype=dtype, chunk_cells=120 * 50)
    assert case.num_rows * HIDDEN_SIZE <= case.chunk_cells < case.num_tokens * case.num_rows
    with _LargestTensor() as whole:
        _step(replace(case, chunk_cells=2**25), path, _leaves(case, path.has_main_grad))
    assert whole.num_bytes == 4 * case.num_tokens * case.num_rows
    with _LargestTensor() as chunks:
        _step(case, path, _leaves(case, path.has_main_grad), with_entropy=True)
    assert chunks.num_bytes == 4 * case.chunk_cells


class _Tied(torch.nn.Module):
    """A head whose weight has another use, as an embedding would be."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, path: Path, leaves: tuple[Tensor, ...]) -> Tensor:
        hidden, _, targets, factors = leaves
        promise = (lambda logp, rows: _gradient(logp, factors[rows])) if path.is_promised else None
        logp, _ = _call(PLAIN, hidden, self.weight, targets, gradient=promise)
        return _loss(logp, factors) + 3.0 * self.weight.sum()


def _tied_under_megatrons_ddp(path: Path) -> Tensor:
    """main_grad after two micro-batches."""
    leaves = _leaves(PLAIN, has_main_grad=False)
    config = TransformerConfig(num_layers=1, hidden_size=HIDDEN_SIZE, num_attention_heads=1)
    options = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config, options, _Tied(leaves[1].detach()))
    for _ in range(2):
        model(path, leaves).backward()
    assert model.module.weight.grad is None
    return model.module.weight.main_grad


FOR_KERNELS = {  # each of their ways once; Triton's interpreter takes its time
    "padding": [PATHS[1], PATHS[3]],
    "a shard of padding alone": [PATHS[3]],
    "chunks of unequal size": [PATHS[0]],
    "logits in the hundreds": [PATHS[3]],
    "bfloat16": [PATHS[1], PATHS[3]],
    "no token": [PATHS[3]],
}


def _kernels_at_tp2() -> list[list[np.ndarray]]:
    """Results by case and path, as Triton's interpreter runs the kernels on a CPU."""
    parallel.initialize(ParallelConfig(tensor=2), seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "_has_kernels", lambda logits: logits.numel() > 0)
        patch.setattr(softmax_kernels, "MAX_BLOCK", 32)  # one of a shard's 60 columns, and a part
        results = [
            [x.float().numpy() for x in _ours(CASES[name], path)]
            for name, paths in FOR_KERNELS.items()
            for path in paths
        ]
    parallel.finalize()
    return results


def _ours_at_tp2() -> tuple[list[list[list[np.ndarray]]], list[np.ndarray]]:
    """Results by path and case; main_grad of the tied head, recomputed and promised."""
    parallel.initialize(ParallelConfig(tensor=2), seed=0)
    results = [
        [[x.float().numpy() for x in _ours(case, path)] for case in CASES.values()]
        for path in PATHS
    ]
    tied = [_tied_under_megatrons_ddp(Path(p, True)).numpy() for p in (False, True)]
    parallel.finalize()
    return results, tied


def _compare_ranks(case: Case, ranks: Sequence[list[np.ndarray]]) -> None:
    first, second = ([torch.from_numpy(x) for x in rank] for rank in ranks)
    for a, b in zip(first[:3], second[:3], strict=True):
        assert torch.equal(a, b), "the ranks differ"
    _compare(case, (*first[:3], torch.cat((first[3], second[3]))))


@pytest.mark.processes
def test_equals_log_softmax_at_tp2() -> None:
    (first_results, first_tied), (second_results, second_tied) = run(_ours_at_tp2, 2)
    for by_case in zip(first_results, second_results, strict=True):
        for case, *ranks in zip(CASES.values(), *by_case, strict=True):
            _compare_ranks(case, ranks)
    for parts in zip(first_tied, second_tied, strict=True):
        tied = torch.cat([torch.from_numpy(part) for part in parts])
        assert _error(tied, 2 * (_oracle(PLAIN)[3] + 3.0)) <= PLAIN.tolerance


@pytest.mark.processes
def test_the_gpus_kernels_equal_log_softmax_at_tp2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    cases = [CASES[name] for name, paths in FOR_KERNELS.items() for _ in paths]
    for case, *ranks in zip(cases, *run(_kernels_at_tp2, 2), strict=True):
        _compare_ranks(case, ranks)
