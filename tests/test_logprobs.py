"""Log-probabilities through vocabulary shards against float64 log_softmax over the whole head."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from processes import run
from torch import Tensor

from megatron_nft.config import ParallelConfig
from megatron_nft.policy import logprobs, parallel

HIDDEN_SIZE = 48


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
        """hidden [T, H], weight [V, H], targets [T] and the gradient of logp [T]."""
        rng = torch.Generator().manual_seed(0)
        hidden = torch.randn(self.num_tokens, HIDDEN_SIZE, generator=rng)
        weight = torch.randn(self.num_rows, HIDDEN_SIZE, generator=rng)
        weight *= self.logit_scale / HIDDEN_SIZE**0.5
        targets = torch.randint(self.vocab_size, (self.num_tokens,), generator=rng)
        grad = torch.randn(self.num_tokens, generator=rng)
        return hidden.to(self.dtype), weight.to(self.dtype), targets, grad


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


def _oracle(case: Case) -> tuple[Tensor, ...]:
    """What `NAMES` says, in float64 and by autograd, over the model's own vocabulary."""
    hidden, weight, targets, grad = case.inputs()
    hidden = hidden.double().requires_grad_()
    weight = weight.double().requires_grad_()
    logits = hidden @ weight[: case.vocab_size].T / case.temperature
    all_logp = logits.log_softmax(-1)
    logp = all_logp.gather(1, targets[:, None])[:, 0]
    logp.backward(grad.double())
    entropy = -(all_logp.exp() * all_logp).sum(-1)
    return logp.detach(), entropy.detach(), hidden.grad, weight.grad


def _ours(case: Case) -> tuple[Tensor, ...]:
    """The same of this rank: its own rows of the head in grad_weight."""
    hidden, weight, targets, grad = case.inputs()
    group = parallel_state.get_tensor_model_parallel_group()
    hidden.requires_grad_()
    shard = weight.chunk(group.size())[group.rank()].clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "CHUNK_CELLS", case.chunk_cells)
        logp, entropy = logprobs.token_logprobs(
            hidden,
            shard,
            targets,
            temperature=case.temperature,
            vocab_size=case.vocab_size,
        )
        logp.backward(grad)
    assert logp.dtype == entropy.dtype == torch.float32
    assert hidden.grad.dtype == shard.grad.dtype == case.dtype
    assert not entropy.requires_grad
    return logp.detach(), entropy, hidden.grad, shard.grad


def _error(ours: Tensor, expected: Tensor) -> float:
    """‖ours − expected‖ / ‖expected‖."""
    assert ours.shape == expected.shape
    return float((ours.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def _compare(case: Case, ours: tuple[Tensor, ...]) -> None:
    for name, value, expected in zip(NAMES, ours, _oracle(case), strict=True):
        assert _error(value, expected) <= case.tolerance, name
    assert not ours[3][case.vocab_size :].any(), "padding has a gradient"


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """Megatron's groups over this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel.finalize()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", CASES)
def test_equals_log_softmax_at_tp1(name: str) -> None:
    _compare(CASES[name], _ours(CASES[name]))


@pytest.mark.usefixtures("alone")
def test_weight_need_not_want_a_gradient() -> None:
    hidden, weight, targets, grad = CASES["plain"].inputs()
    hidden.requires_grad_()
    logp, _ = logprobs.token_logprobs(hidden, weight, targets, temperature=1.0, vocab_size=120)
    logp.backward(grad)
    assert _error(hidden.grad, _oracle(CASES["plain"])[2]) <= 1e-6


def _ours_at_tp2() -> list[list[np.ndarray]]:
    parallel.initialize(ParallelConfig(tensor=2), seed=0)
    results = [[x.float().numpy() for x in _ours(case)] for case in CASES.values()]
    parallel.finalize()
    return results


@pytest.mark.processes
def test_equals_log_softmax_at_tp2() -> None:
    for case, *ranks in zip(CASES.values(), *run(_ours_at_tp2, 2), strict=True):
        first, second = ([torch.from_numpy(x) for x in rank] for rank in ranks)
        for a, b in zip(first[:3], second[:3], strict=True):
            assert torch.equal(a, b), "the ranks differ"
        _compare(case, (*first[:3], torch.cat((first[3], second[3]))))
