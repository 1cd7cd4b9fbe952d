"""A plan's seconds: against what was published, against arithmetic by hand, and what must hold."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plan as benchmark
import pytest
from test_plan import QWEN_30B_A3B, QWEN_32B, config

from megatron_nft.config import (
    Config,
    EvaluateConfig,
    Fp8Config,
    MemoryConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SourceConfig,
)
from megatron_nft.plan import cards, layers, sampling, tables, traffic
from megatron_nft.plan.cards import CARDS
from megatron_nft.plan.estimate import Plan, plan_for
from megatron_nft.plan.memory import GIB
from megatron_nft.plan.plan import Asked, plan
from megatron_nft.plan.suggest import changes, faster_sampling, largest_fraction, suggestions
from megatron_nft.plan.workload import Workload, workload_of

H100 = CARDS["h100"]
LAYOUT = {"tensor": 8, "sequence": True}


def planned(options: Config, num_gpus: int = 128, **known: float) -> Plan:
    return plan_for(QWEN_32B, options, num_gpus, H100, workload_of(options, **known))


def test_published_runs_take_what_was_published() -> None:
    """RL steps within 25%, training rates within 15%."""
    for row in benchmark.published():
        limit = 0.15 if "training" in row.name else 0.25
        assert row.planned == pytest.approx(row.said, rel=limit), str(row)


def test_own_measurements_come_out_as_measured() -> None:
    """Half a billion parameters wait for the host, whose own time is hardly modelled."""
    for row in benchmark.own():
        limit = 0.25 if "0.5B" in row.name else 0.12
        assert row.planned == pytest.approx(row.said, rel=limit), str(row)


def test_a_row_says_how_far_off_it_is_and_what_was_fitted_to() -> None:
    made = planned(config(**LAYOUT))
    shown = str(benchmark.Row("a run", made, "s a step", 200.0, 150.0, True))
    assert shown.split() == ["a", "run", "s", "a", "step", "200", "150", "-25%", "fitted", "to"]


def test_answers_have_the_mean_that_was_said() -> None:
    for mean in (50.0, 1000.0, 3000.0, 3500.0):
        load = Workload(100, mean, 1.0, 3584, 64, 64, 16)
        lengths = load.lengths(1000)
        assert lengths.mean() == pytest.approx(mean, rel=0.01)
        assert lengths.max() <= 3584
        assert (np.diff(lengths) >= 0).all()
        whole = 100 + load.lengths()
        assert load.attended == pytest.approx((whole**2).sum() / whole.sum())


def test_sampling_goes_step_by_step() -> None:
    """Two answers in two places, then the same in one."""
    options = config(**LAYOUT)
    decoder = sampling.Decoder(QWEN_32B, options, H100)
    together = sum(decoder.seconds(2, 2 * 7 + 2 * i + 1) for i in range(3))
    alone = sum(decoder.seconds(1, 7 + 3 + i + 0.5) for i in range(2))
    found = sampling._decoded(decoder, [3.0, 5.0], 2, 7.0, 2)
    assert found == pytest.approx(together + alone, rel=1e-6)
    one_by_one = sum(decoder.seconds(1, 7 + i + 0.5) for length in (3, 5) for i in range(length))
    found = sampling._decoded(decoder, [3.0, 5.0], 1, 7.0, 2)
    assert found == pytest.approx(one_by_one, rel=1e-6)
    first = sampling._decoded(decoder, [3.0, 5.0], 2, 7.0, 1)  # the other one is cut off
    assert first == pytest.approx(together, rel=1e-6)


def test_a_decoding_step_reads_what_it_must() -> None:
    decoder = sampling.Decoder(QWEN_32B, config(**LAYOUT), H100)
    weights = 2 * (32_763_876_352 - 152_064 * 5120)  # but the embedding
    read = weights / 4 / (cards.DECODING * H100.bandwidth)
    reduced = 2 * 64 * (cards.ALL_REDUCE_S + 1.5 * 2 * 5120 / H100.nvlink)
    rest = cards.STEP_S + cards.SEQUENCE_S
    assert decoder.seconds(1, 0) == pytest.approx(read + reduced + rest, rel=2e-3)
    cached = 2 * 2 * 64 * 8 * 128 * 1e6 / 4 / (cards.DECODING * H100.bandwidth)
    assert decoder.seconds(1, 1e6) - decoder.seconds(1, 0) == pytest.approx(cached)
    fp8 = replace(config(**LAYOUT), rollout=replace(config().rollout, quantization="fp8"))
    assert sampling.Decoder(QWEN_32B, fp8, H100).seconds(1, 0) < decoder.seconds(1, 0)


def test_few_answers_touch_few_experts() -> None:
    decoder = sampling.Decoder(QWEN_30B_A3B, config(**LAYOUT), H100)
    experts = 48 * 128 * 3 * 2048 * 768
    none = decoder.weight_bytes(0)
    for number, share in ((1, 8 / 128), (2, 1 - (120 / 128) ** 2), (1000, 1.0)):
        touched = decoder.weight_bytes(number) - none
        assert touched == pytest.approx(2 * experts * share)


def test_what_is_computed_again_is_paid_again() -> None:
    def backward(**changes: Any) -> float:
        options = replace(config(**LAYOUT), memory=MemoryConfig(**changes))
        one = layers.layer_time(QWEN_32B, options, H100, 16_384, 5000)
        assert one.forward == plain.forward
        return one.backward - plain.backward

    plain = layers.layer_time(QWEN_32B, config(**LAYOUT), H100, 16_384, 5000)
    assert backward(recompute="full") == pytest.approx(plain.forward)
    rate = H100.bf16 * 16_384 / (16_384 + cards.HALF_RATE_ROWS)
    products = 2 * 3 * 5120 * 27_648 * 16_384 / 8 / rate
    gated = 2 * 3 * 27_648 / 8 * 16_384 / (cards.PASSES["transformer_engine"] * H100.bandwidth)
    exchanged = 2 * 2 * 5120 * 16_384 * 7 / 8 / H100.nvlink
    again = backward(recompute="selective", recompute_modules=["mlp"])
    assert again == pytest.approx(products + gated + exchanged)
    scores = 2 * 5000 * 5120 * 16_384 / 8 / H100.attention["transformer_engine"]
    again = backward(recompute="selective", recompute_modules=["core_attn"])
    assert again == pytest.approx(scores)


def test_a_layer_takes_no_less_than_its_launches() -> None:
    least = cards.LAUNCHES["transformer_engine"]
    one = layers.layer_time(QWEN_32B, config(**LAYOUT), H100, 10, 10)
    assert (one.forward, one.backward) == (least, least)


def test_fp8_is_for_products_alone() -> None:
    fast = replace(config(**LAYOUT), fp8=Fp8Config(format="e4m3", recipe="tensorwise"))
    plain, fp8 = (
        layers.forward_pass(QWEN_32B, options, H100, 16_384, 5000)
        for options in (config(**LAYOUT), fast)
    )
    assert fp8.products / plain.products == pytest.approx(H100.bf16 / H100.fp8["tensorwise"])
    assert (fp8.attention, fp8.exchanged) == (plain.attention, plain.exchanged)


def test_a_pipeline_waits_for_its_first_and_last_micro_batches() -> None:
    def training(**changes: int) -> float:
        options = replace(config(**LAYOUT | changes), memory=MemoryConfig(recompute="full"))
        return planned(options).times.training

    assert training(pipeline=2) > training()
    assert training(pipeline=4) > training(pipeline=2)
    assert training(pipeline=4, virtual_pipeline=4) < training(pipeline=4)


def test_more_gpus_are_faster_and_cost_more() -> None:
    options = config(**LAYOUT)
    held = planned(options, 32).held
    plans = [
        plan_for(QWEN_32B, options, n, H100, workload_of(options), held) for n in (32, 128, 1024)
    ]
    totals = [one.times.total for one in plans]
    assert totals == sorted(totals, reverse=True)
    rates = [one.times.tokens_per_gpu for one in plans]
    assert rates == sorted(rates, reverse=True)
    first = plans[0].times
    assert first.tokens_per_gpu == pytest.approx(first.trained_tokens / first.total / 32)


def test_phases_are_there_where_they_happen() -> None:
    options = config(**LAYOUT)
    usual = planned(options).times
    assert usual.offloading == 0
    assert usual.total == pytest.approx(
        usual.sampling + usual.old_logp + usual.training + usual.weights + usual.between
    )
    lent = planned(replace(options, memory=MemoryConfig(offload=True)))
    [rank] = lent.ranks
    assert lent.times.offloading == pytest.approx(2 * rank.optimizer / H100.host)
    assert planned(replace(options, old_logp="rollout")).times.old_logp == 0
    remote = replace(options.rollout, engine="remote", num_servers=4, max_steps_off_policy=1)
    lent = replace(options, rollout=remote, memory=MemoryConfig(offload=True))
    ahead = planned(lent).times
    assert ahead.num_gpus == 128 + 4 * 4
    assert ahead.offloading == 0  # nothing is lent to servers
    size = 2 * 32_763_876_352
    assert ahead.weights == pytest.approx(2 * size / cards.FILES, rel=1e-3)
    by_nccl = replace(lent, rollout=replace(remote, weight_transfer="nccl"))
    assert planned(by_nccl).times.weights == pytest.approx(4 * size / H100.network, rel=1e-3)
    beside = max(ahead.sampling, ahead.old_logp + ahead.training)
    assert ahead.total == pytest.approx(beside + ahead.weights + ahead.between)
    sft = planned(replace(options, objective=ObjectiveConfig(name="sft"))).times
    assert (sft.sampling, sft.old_logp, sft.lent) == (0, 0, 0)
    assert sft.total == sft.training
    assert sft.trained_tokens == pytest.approx(usual.trained_tokens / 16)


def test_updates_and_micro_batches_are_counted() -> None:
    options = config(**LAYOUT)
    options = replace(
        options, optimizer=OptimizerConfig(questions_per_minibatch=32, tokens_per_microbatch=16384)
    )
    times = planned(options, answer_tokens=1000, prompt_tokens=100).times
    assert times.updates == 16
    assert times.trained_tokens == 512 * 16 * 1100
    a_rank = 32 * 16 * 1100 / 16
    assert times.micro_batches == -(-a_rank // (16384 * 0.95))
    sent = {one.what: one for one in times.traffic}
    [held] = planned(options).held
    reduced = held.total * (4 + 2) * 15 / 16 * 16
    assert sent["gradients and weights"].sent == pytest.approx(reduced)
    assert not sent["gradients and weights"].is_nvlink
    assert sent["layers, tensor ranks"].is_nvlink
    passes = 64 * 2 * 5120 * 7 / 8 * (4 + 4 + 6)  # old log-probabilities, forward, backward
    a_gpu = times.trained_tokens / 16  # of 16 data-parallel ranks
    assert sent["layers, tensor ranks"].sent == pytest.approx(passes * a_gpu, rel=1e-6)


def test_evaluations_are_counted_where_their_files_are(tmp_path: Path) -> None:
    (tmp_path / "sums.jsonl").write_text('{"question": "1", "answer": "1"}\n' * 40)
    sets = [SourceConfig(path=str(tmp_path / "sums.jsonl"), samples=32), SourceConfig(path="none")]
    options = replace(config(**LAYOUT), rollouts=10, evaluate=EvaluateConfig(sets=sets, every=2))
    made = planned(options)
    assert made.workload.evaluated == ((40, 32),)
    alone = sampling.sampling_seconds(QWEN_32B, options, H100, 128, made.workload, 40, 32)
    assert made.evaluation == pytest.approx(made.times.lent + alone)
    assert made.seconds == pytest.approx(10 * made.times.total + 6 * made.evaluation)
    assert "1 of 2 sets not counted" in tables.scaling(made, [])
    never = planned(replace(options, evaluate=EvaluateConfig(sets=sets, every=0)))
    assert never.seconds == pytest.approx(10 * never.times.total)
    assert planned(config(**LAYOUT)).evaluation == 0


def test_engines_are_asked_as_often_as_a_batch_needs() -> None:
    def asked(mixed: float = 0.5, **changes: Any) -> tuple[float, int]:
        options = config(**LAYOUT)
        options = replace(options, rollout=replace(options.rollout, **changes))
        load = workload_of(options, mixed=mixed)
        return load.num_asked, load.num_asks

    assert asked() == (1024, 1)
    assert asked(questions_asked=1536) == (1536, 1)
    assert asked(questions_asked=600) == (600, 2)
    assert asked(mixed=0.1) == (1536, 4)  # at most three times the batch at once
    assert asked(mixed=0.01, max_asks=10) == (1536, 10)
    assert asked(finish_fraction=0.8) == (1280, 1)
    once, twice = config(**LAYOUT), replace(config().rollout, questions_asked=512)
    half = planned(replace(once, rollout=twice)).times.sampling
    assert half > planned(once).times.sampling  # two tails


def test_an_engine_that_holds_no_answer_does_not_fit() -> None:
    options = replace(config(**LAYOUT), memory=MemoryConfig(offload=True))
    small = replace(options, rollout=replace(options.rollout, tensor=1))
    made = planned(small)
    assert made.peak < 0.95 * H100.memory_gib * GIB
    assert not made.engine_fits
    assert not made.fits
    assert largest_fraction(QWEN_32B, made) == 0
    remote = replace(small, rollout=replace(small.rollout, engine="remote", num_servers=8))
    assert not planned(remote).fits


def test_gradients_go_by_as_many_network_cards_as_share_them() -> None:
    for tensor in (1, 2, 8):
        options = config(tensor=tensor, sequence=tensor > 1)
        held = planned(options, 32).held
        found = traffic.reduction(options, H100, 32, held)
        ranks = 32 // tensor
        sent = sum(one.total for one in held) * 6 * (ranks - 1) / ranks
        assert found.sent == pytest.approx(sent)
        assert found.seconds == pytest.approx(sent / min(H100.nvlink, H100.network * 8 / tensor))
    split = config(tensor=4, pipeline=2, sequence=True)
    assert traffic.reduction(split, H100, 16, planned(split, 16).held).is_nvlink
    assert not traffic.weights(QWEN_32B, split, H100, 16).is_nvlink  # stages are 8 GPUs apart
    assert traffic.weights(QWEN_32B, split, H100, 8).is_nvlink


def test_an_interleaved_schedule_takes_whole_rounds() -> None:
    def micro_batches(**changes: int) -> int:
        return planned(config(**LAYOUT | changes), 128).times.micro_batches

    plain = micro_batches(pipeline=4)
    rounds = micro_batches(pipeline=4, virtual_pipeline=4)
    assert rounds == -(-plain // 4) * 4


def test_suggestions_are_faster_and_the_fastest_is_first() -> None:
    options = replace(config(**LAYOUT), memory=MemoryConfig(recompute="full", offload=True))
    made = planned(options)
    assert made.fits
    found = suggestions(QWEN_32B, made)
    assert found
    assert all(one.fits and one.times.total < made.times.total for one in found)
    totals = [one.times.total for one in found]
    assert totals == sorted(totals)
    assert "memory.recompute=none" in changes(made.config, found[0].config)


def test_what_is_suggested_can_be_given(tmp_path: Path) -> None:
    """Lists stay as they are, and nothing is said that a recipe may not hold."""
    modules = {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]}
    options = replace(config(tensor=2, sequence=True), memory=MemoryConfig(**modules))
    made = planned(options, 16)
    found = suggestions(QWEN_32B, made)
    assert found
    fewest = [changes(options, one.config).count("=") for one in found]
    assert fewest[0] == min(fewest)  # it does not fit: the least change is first
    for one in found:
        assert one.config.memory.recompute_modules == ["core_attn", "mlp"]
        assert "[" not in changes(options, one.config)
    floats = replace(config(**LAYOUT), model=ModelConfig(path="m", dtype="float32"))
    for one in suggestions(QWEN_32B, planned(floats, 16)):
        assert not one.config.memory.offload


def test_engines_that_sample_faster_are_suggested() -> None:
    made = planned(config(**LAYOUT))
    found = faster_sampling(QWEN_32B, made)
    times = [one.times.sampling for one in found]
    assert times == sorted(times)
    assert 0 < times[0] < 0.9 * made.times.sampling
    assert "rollout.tensor=8" in changes(made.config, found[0].config)
    few = replace(made.config.rollout, tensor=8, max_sequences=1024)
    assert faster_sampling(QWEN_32B, planned(replace(made.config, rollout=few))) == []
    remote = replace(made.config.rollout, engine="remote", num_servers=8)
    there = planned(replace(made.config, rollout=remote))
    for one in faster_sampling(QWEN_32B, there):
        assert one.times.num_gpus == there.times.num_gpus


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (
            {"answer_tokens": 20_000},
            "--answer-tokens was 20000; it may be .* at most 14336",
        ),
        ({"prompt_tokens": -1}, "--prompt-tokens was -1"),
        ({"mixed": 0}, "--mixed was 0; it may be above 0 and at most 1"),
    ],
)
def test_what_cannot_be(known: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workload_of(config(), **known)


def test_a_recipe_of_fp8_that_the_card_has_not(tmp_path: Path) -> None:
    QWEN_32B.save_pretrained(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"run_dir: run\nmodel: {{path: {tmp_path}/model, layers: transformer_engine}}\n"
        "data: {train: [{path: t.jsonl}], template: raw}\nparallel: {tensor: 8, sequence: true}\n"
        "fp8: {format: e4m3, recipe: blockwise}\n"
    )
    with pytest.raises(ValueError, match=r"fp8.recipe was blockwise; on --gpu b200 it may be"):
        plan(recipe, Asked(16, "b200"), ())
    with pytest.raises(ValueError, match="--gpus was 0; it may be at least 1"):
        plan(recipe, Asked(0, "h100"), ())
    with pytest.raises(ValueError, match="--gpu was 'a100'; it may be h100, h200, b200"):
        plan(recipe, Asked(16, "a100"), ())
    # Transformer Engine's layers are planned where they could not be built
    assert plan(recipe, Asked(16, "h200"), ()) == 1  # no weights in the directory
