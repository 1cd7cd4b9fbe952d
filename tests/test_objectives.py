"""Objectives against the paper's identities, the official NFT code's formulas and PPO's, by value.

References here are float64 and written from the formulas in plain Python, one token or one
sequence at a time: they share no code with the objectives.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_nft.config import OBJECTIVE_NAMES, ObjectiveConfig
from megatron_nft.objectives import OBJECTIVES, Objective, TokenBatch, dapo, dr_grpo, grpo, nft, rft

OMEGA_OF_NORMALIZE = {0: "uniform", 1: "dr_grpo", 2: "grpo"}
LOG_RATIOS = {  # from nearly on-policy to a broken run
    "near": lambda shape, rng: 0.3 * torch.randn(shape, generator=rng),
    "far": lambda shape, rng: 5.0 * torch.randn(shape, generator=rng),
    "extreme": lambda shape, rng: torch.empty(shape).uniform_(-50, 50, generator=rng),
}


def make_batch(
    correct: list[float] | Tensor,
    accuracy: list[float] | Tensor,
    sequence_ids: list[int] | Tensor | None = None,
) -> TokenBatch:
    """Tokens sampled with log-probability −2; each its own sequence unless told otherwise."""
    correct = torch.as_tensor(correct, dtype=torch.float32)
    ids = torch.arange(len(correct)) if sequence_ids is None else torch.as_tensor(sequence_ids)
    return TokenBatch(
        old_logp=torch.full_like(correct, -2.0),
        correct=correct,
        group_accuracy=torch.as_tensor(accuracy, dtype=torch.float32),
        sequence_ids=ids,
        num_sequences=int(ids.max()) + 1,
    )


def random_batch(num_sequences: int = 64, seed: int = 0) -> tuple[TokenBatch, torch.Generator]:
    """Sequences of 1 to 12 tokens, all token positions shuffled; r̂ in k/16, from 1/16 to 15/16."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 13, (num_sequences,), generator=rng)
    ids = torch.arange(num_sequences).repeat_interleave(lengths)
    ids = ids[torch.randperm(len(ids), generator=rng)]
    correct = torch.randint(0, 2, (num_sequences,), generator=rng).float()
    accuracy = torch.randint(1, 16, (num_sequences,), generator=rng) / 16
    return make_batch(correct[ids], accuracy[ids], ids), rng


def evaluate(
    objective: Objective, batch: TokenBatch, log_ratio: list[float] | Tensor, **options: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Losses, dΣloss/dlogp and metrics, at logp = old_logp + log_ratio."""
    log_ratio = torch.as_tensor(log_ratio, dtype=torch.float32)
    logp = (batch.old_logp + log_ratio).requires_grad_()
    result = objective(batch, logp, ObjectiveConfig(**options))
    result.loss.sum().backward()
    assert result.loss.dtype == torch.float32
    assert not any(metric.requires_grad for metric in result.metrics.values())
    assert logp.grad is not None
    return result.loss.detach(), logp.grad, result.metrics


def gradient(
    objective: Objective, batch: TokenBatch, log_ratio: list[float] | Tensor, **options: Any
) -> Tensor:
    return evaluate(objective, batch, log_ratio, **options)[1]


def exact_log_ratios(batch: TokenBatch, kind: str, rng: torch.Generator) -> Tensor:
    """Log-ratios as the objective sees them: after logp = old_logp + log_ratio has been rounded."""
    return (batch.old_logp + LOG_RATIOS[kind](batch.correct.shape, rng)) - batch.old_logp


def omega(name: str, accuracy: float) -> float:
    return {
        "uniform": 1.0,
        "dr_grpo": 1 - accuracy,
        "grpo": math.sqrt((1 - accuracy) / accuracy),
    }[name]


def official_token(
    log_ratio: float, correct: float, accuracy: float, epsilon: float, weight: float, normalize: int
) -> tuple[float, float]:
    """The official code's loss of one token (or one sequence), and its derivative by hand."""
    q = min(max(accuracy, 0.02), 0.98)
    scale = omega(OMEGA_OF_NORMALIZE[normalize], q)
    moves = 1.0 if log_ratio <= 10 else 0.0  # the derivative of min(log_ratio, 10)
    log_ratio = min(log_ratio, 10.0)
    if correct:
        return -scale * log_ratio, -scale * moves
    x = (1 - q * math.exp(log_ratio)) / (1 - q)
    value = max(x, epsilon)
    slope = q / (1 - q) * math.exp(log_ratio) / value
    return -scale * weight * math.log(value), scale * weight * slope * moves


def test_every_configured_objective_exists() -> None:
    assert tuple(OBJECTIVES) == OBJECTIVE_NAMES


# NFT: the paper


@pytest.mark.parametrize(
    ("accuracy", "ratio", "epsilon", "expected"),
    [
        (0.75, 3.0, 1.0, 2.25),
        (0.75, 3.0, 0.1, 22.5),
        (0.25, 0.5, 1.0, 0.10714285714285714),
        (0.25, 0.5, 0.1, 0.10714285714285714),
    ],
)
def test_nft_gradient_on_a_wrong_token(
    accuracy: float, ratio: float, epsilon: float, expected: float
) -> None:
    found = gradient(nft, make_batch([0], [accuracy]), [math.log(ratio)], epsilon=epsilon)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_nft_gradient_on_a_right_token_has_no_ratio() -> None:
    batch = make_batch([1] * 5, [0.25] * 5)
    found = gradient(nft, batch, [-50.0, -3.0, 0.0, 3.0, 9.9])
    assert found.tolist() == [-0.75] * 5


@pytest.mark.parametrize("name", OMEGA_OF_NORMALIZE.values())
@pytest.mark.parametrize("epsilon", [1.0, 0.5, 0.1])
def test_nft_coefficients_on_random_tokens(name: str, epsilon: float) -> None:
    batch, rng = random_batch()
    log_ratio = exact_log_ratios(batch, "near", rng)
    r, q, ratio = batch.correct.double(), batch.group_accuracy.double(), log_ratio.double().exp()
    weight = torch.tensor([omega(name, x) for x in q.tolist()], dtype=torch.float64)
    x = (1 - q * ratio) / (1 - q)
    expected = torch.where(r == 1, -weight, weight * q / (1 - q) * ratio / x.clamp(min=epsilon))
    found = gradient(nft, batch, log_ratio, omega=name, epsilon=epsilon)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_nft_loss_of_a_wrong_token_is_no_progress_metric_at_epsilon_1() -> None:
    batch, rng = random_batch()
    log_ratio = exact_log_ratios(batch, "near", rng)
    loss, _, metrics = evaluate(nft, batch, log_ratio)
    wrong, above = batch.correct == 0, log_ratio >= 0
    assert (loss[wrong] <= 0).all()
    assert (loss[wrong & above] == 0).all()
    assert (loss[wrong & ~above] < 0).all()
    assert metrics["clip_fraction"].tolist() == (wrong & (log_ratio > 0)).float().tolist()
    assert not evaluate(nft, batch, torch.zeros_like(log_ratio))[2]["clip_fraction"].any()
    torch.testing.assert_close(metrics["ratio"], log_ratio.exp())


def reinforce(batch: TokenBatch, advantage: Tensor) -> Tensor:
    """dΣ(−A·log π)/dlogp through autograd, float64."""
    logp = batch.old_logp.double().requires_grad_()
    (-advantage * logp).sum().backward()
    assert logp.grad is not None
    return logp.grad


@pytest.mark.parametrize("epsilon", [1.0, 0.5, 0.1])
def test_nft_on_policy_is_its_relatives(epsilon: float) -> None:
    batch, rng = random_batch()
    r, q = batch.correct.double(), batch.group_accuracy.double()
    on_policy = torch.zeros_like(batch.correct)

    def nft_gradient(name: str) -> Tensor:
        return gradient(nft, batch, on_policy, omega=name, epsilon=epsilon)

    def assert_same(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=0)

    assert_same(nft_gradient("grpo"), gradient(grpo, batch, on_policy))
    assert_same(nft_gradient("grpo"), reinforce(batch, (r - q) / (q * (1 - q)).sqrt()))
    assert_same(nft_gradient("dr_grpo"), gradient(dr_grpo, batch, on_policy))
    assert_same(nft_gradient("dr_grpo"), reinforce(batch, r - q))

    uniform = nft_gradient("uniform").double()  # ω only multiplies
    maxrl_omega = (1 - q) / q
    assert_same(maxrl_omega * uniform, reinforce(batch, (r - q) / q))
    any_omega = torch.rand(len(q), generator=rng, dtype=torch.float64) + 0.1
    assert_same(any_omega * uniform, reinforce(batch, any_omega / (1 - q) * (r - q)))


# NFT: the official code


@pytest.mark.parametrize("kind", LOG_RATIOS)
@pytest.mark.parametrize("epsilon", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("negative_weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("normalize", OMEGA_OF_NORMALIZE)
def test_nft_is_the_official_loss_of_a_token(
    kind: str, epsilon: float, negative_weight: float, normalize: int
) -> None:
    batch, rng = random_batch()
    batch = replace(batch, group_accuracy=torch.rand(len(batch.correct), generator=rng))
    batch.group_accuracy[:4] = torch.tensor([0.0, 1.0, 0.01, 0.99])
    log_ratio = exact_log_ratios(batch, kind, rng)
    tokens = zip(log_ratio, batch.correct, batch.group_accuracy, strict=True)
    expected = torch.tensor(
        [
            official_token(*(x.item() for x in token), epsilon, negative_weight, normalize)
            for token in tokens
        ],
        dtype=torch.float64,
    )
    loss, grad, _ = evaluate(
        nft,
        batch,
        log_ratio,
        epsilon=epsilon,
        negative_weight=negative_weight,
        omega=OMEGA_OF_NORMALIZE[normalize],
    )
    torch.testing.assert_close(loss.double(), expected[:, 0], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(grad.double(), expected[:, 1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", LOG_RATIOS)
@pytest.mark.parametrize("epsilon", [1.0, 0.1])
@pytest.mark.parametrize("normalize", OMEGA_OF_NORMALIZE)
def test_nft_with_the_sequence_ratio_is_the_official_loss_of_a_sequence(
    kind: str, epsilon: float, normalize: int
) -> None:
    batch, rng = random_batch()
    log_ratio = exact_log_ratios(batch, kind, rng)
    loss, grad, metrics = evaluate(
        nft,
        batch,
        log_ratio,
        ratio="sequence",
        epsilon=epsilon,
        negative_weight=0.5,
        omega=OMEGA_OF_NORMALIZE[normalize],
    )
    for sequence in range(batch.num_sequences):
        tokens = batch.sequence_ids == sequence
        total = log_ratio[tokens].double().sum().item()
        r, q = batch.correct[tokens][0].item(), batch.group_accuracy[tokens][0].item()
        expected, slope = official_token(total, r, q, epsilon, 0.5, normalize)
        assert loss[tokens].sum().item() == pytest.approx(expected, rel=1e-4, abs=2e-5)
        assert (loss[tokens] == loss[tokens][0]).all()
        assert grad[tokens].tolist() == pytest.approx([slope] * int(tokens.sum()), rel=1e-3)
        ratio = math.exp(min(total, 10.0))
        assert metrics["ratio"][tokens].tolist() == pytest.approx(
            [ratio] * int(tokens.sum()), rel=1e-4
        )


def test_the_sequence_ratio_needs_nothing_of_other_sequences() -> None:
    batch, rng = random_batch()
    log_ratio = exact_log_ratios(batch, "near", rng)
    together, _, _ = evaluate(nft, batch, log_ratio, ratio="sequence")
    for sequence in range(batch.num_sequences):
        tokens = batch.sequence_ids == sequence
        num_tokens = int(tokens.sum())
        alone = make_batch(batch.correct[tokens], batch.group_accuracy[tokens], [0] * num_tokens)
        loss, _, _ = evaluate(nft, alone, log_ratio[tokens], ratio="sequence")
        torch.testing.assert_close(loss, together[tokens])


def test_clipping_the_value_is_exact_where_the_implicit_ratio_is_huge() -> None:
    loss, grad, _ = evaluate(nft, make_batch([0], [0.98]), [10.0], epsilon=0.001, omega="uniform")
    assert loss.item() == pytest.approx(-math.log(0.001), rel=1e-6)
    assert grad.item() == pytest.approx(49 * math.exp(10) / 0.001, rel=1e-5)


# The others


def test_rft_and_sft_are_likelihoods() -> None:
    batch, rng = random_batch()
    log_ratio = exact_log_ratios(batch, "near", rng)
    logp = batch.old_logp + log_ratio
    loss, grad, _ = evaluate(rft, batch, log_ratio)
    assert torch.equal(loss, -batch.correct * logp)
    assert torch.equal(grad, gradient(nft, batch, log_ratio, negative_weight=0.0, omega="uniform"))
    loss, grad, metrics = evaluate(OBJECTIVES["sft"], batch, log_ratio)
    assert torch.equal(loss, -logp)
    assert (grad == -1).all()
    assert metrics == {}


def ppo_token(
    log_ratio: float, advantage: float, low: float, high: float
) -> tuple[float, float, float]:
    """PPO's clipped loss of one token by cases, its derivative, and whether it is clipped."""
    ratio = math.exp(log_ratio)
    if advantage > 0 and ratio > 1 + high:
        return -(1 + high) * advantage, 0.0, 1.0
    if advantage < 0 and ratio < 1 - low:
        return -(1 - low) * advantage, 0.0, 1.0
    return -ratio * advantage, -ratio * advantage, 0.0


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.1, 0.5)])
@pytest.mark.parametrize("objective", [grpo, dr_grpo, dapo])
def test_the_clipped_family_is_ppo(objective: Objective, low: float, high: float) -> None:
    batch, rng = random_batch()
    log_ratio = exact_log_ratios(batch, "near", rng)

    def advantage(r: float, q: float) -> float:
        return r - q if objective is dr_grpo else (r - q) / (math.sqrt(q * (1 - q)) + 1e-6)

    tokens = zip(log_ratio, batch.correct, batch.group_accuracy, strict=True)
    expected = torch.tensor(
        [ppo_token(x.item(), advantage(r.item(), q.item()), low, high) for x, r, q in tokens],
        dtype=torch.float64,
    )
    loss, grad, metrics = evaluate(objective, batch, log_ratio, clip_low=low, clip_high=high)
    torch.testing.assert_close(loss.double(), expected[:, 0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), expected[:, 1], rtol=1e-5, atol=0)
    assert torch.equal(metrics["clip_fraction"].double(), expected[:, 2])
    assert 0 < metrics["clip_fraction"].mean() < 1


def test_the_standard_deviation_is_that_of_the_group() -> None:
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 0], dtype=torch.float64)
    batch = make_batch(rewards.float(), rewards.mean().expand(8))
    loss, _, _ = evaluate(grpo, batch, torch.zeros(8))
    expected = -(rewards - rewards.mean()) / rewards.std(correction=0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_everything_is_finite(name: str, ratio: str) -> None:
    grid = [
        (log_ratio, correct, accuracy)
        for log_ratio in (-500.0, -50.0, -1.0, 0.0, 1.0, 10.0, 50.0, 500.0)
        for correct, accuracy in ((0, 0.0), (1, 1.0), (0, 0.5), (1, 0.5), (0, 1.0), (1, 0.0))
    ]
    log_ratio, correct, accuracy = (list(column) for column in zip(*grid, strict=True))
    pairs = [i // 2 for i in range(len(grid))]
    for epsilon in (1.0, 0.1):
        loss, grad, metrics = evaluate(
            OBJECTIVES[name],
            make_batch(correct, accuracy, pairs),
            log_ratio,
            ratio=ratio,
            epsilon=epsilon,
        )
        for values in (loss, grad, *metrics.values()):
            assert values.isfinite().all()


def test_groups_all_right_or_all_wrong_teach_the_clipped_family_nothing() -> None:
    batch = make_batch([0, 0, 1, 1], [0.0, 0.0, 1.0, 1.0])
    for objective in (grpo, dr_grpo, dapo):
        assert gradient(objective, batch, [-1.0, 1.0, -1.0, 1.0]).tolist() == [0.0] * 4
