"""What a plan says, against models that are really built and against arithmetic by hand."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from toys import save_qwen2, save_tokenizer
from transformers import AutoConfig, Qwen2Config, Qwen3MoeConfig

from megatron_nft.config import (
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    SourceConfig,
)
from megatron_nft.plan import memory, suggest
from megatron_nft.plan.cards import CARDS
from megatron_nft.plan.estimate import Plan, plan_for
from megatron_nft.plan.memory import GIB
from megatron_nft.plan.parameters import held_by_ranks
from megatron_nft.plan.workload import workload_of

H100 = CARDS["h100"]
QWEN_32B = Qwen2Config(
    architectures=["Qwen2ForCausalLM"],
    hidden_size=5120,
    intermediate_size=27648,
    num_hidden_layers=64,
    num_attention_heads=40,
    num_key_value_heads=8,
    vocab_size=152064,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)
QWEN_30B_A3B = Qwen3MoeConfig(
    architectures=["Qwen3MoeForCausalLM"],
    hidden_size=2048,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_experts=128,
    num_experts_per_tok=8,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    vocab_size=151936,
    norm_topk_prob=True,
    tie_word_embeddings=False,
)
# their model cards: 32.5B of which 31.0B are not in the embeddings; 30.5B
NUM_32B, NUM_30B = 32_763_876_352, 30_532_122_624


def config(**parallel: int | bool) -> Config:
    return Config(
        model=ModelConfig(path="model"),
        parallel=ParallelConfig(**parallel),
        run_dir="run",
        data=DataConfig(train=[SourceConfig(path="t.jsonl")], max_prompt_tokens=2048),
        rollout=RolloutConfig(max_response_tokens=14336, tensor=4, memory_fraction=0.6),
        optimizer=OptimizerConfig(tokens_per_microbatch=16384),
    )


def planned(options: Config, num_gpus: int) -> Plan:
    return plan_for(QWEN_32B, options, num_gpus, H100, workload_of(options))


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (8, 1), (4, 2), (2, 4)])
def test_all_ranks_together_hold_the_model(tensor: int, pipeline: int) -> None:
    """But for the norms, which every tensor rank has."""
    held = held_by_ranks(QWEN_32B, config(tensor=tensor, pipeline=pipeline), 128)
    norms = (2 * 64 + 1) * 5120
    assert [one.stage for one in held] == list(range(pipeline))
    assert all(one.expert == 0 for one in held)
    assert tensor * sum(one.total for one in held) == NUM_32B + (tensor - 1) * norms


def test_experts_are_shared_out_apart_from_the_rest() -> None:
    [held] = held_by_ranks(QWEN_30B_A3B, config(tensor=4, expert=8, sequence=True), 32)
    experts = 48 * 128 * 3 * 2048 * 768
    assert held.expert == experts / 8
    shared = 4 * held.dense
    replicated = 48 * (2 * 2048 + 2 * 128 + 128 * 2048) + 2048  # norms and routers
    assert shared - 3 * replicated == NUM_30B - experts


def test_what_is_exact_by_hand() -> None:
    made = planned(config(tensor=8, sequence=True), 128)
    [rank] = made.ranks
    norms = (2 * 64 + 1) * 5120
    each = (NUM_32B + 7 * norms) / 8
    assert rank.weights == pytest.approx(2 * each)
    assert rank.gradients == pytest.approx(4 * each)
    assert rank.optimizer == pytest.approx(12 * each / 16)  # 16 data-parallel ranks
    assert rank.engine == 0.6 * 79.6 * GIB
    plain = replace(made.config.parallel, distributed_optimizer=False)
    [alone] = planned(replace(made.config, parallel=plain), 128).ranks
    assert alone.optimizer == pytest.approx(12 * each)
    assert memory.engine_weights(QWEN_32B, made.config) == pytest.approx(2 * NUM_32B / 4, rel=1e-3)
    per_token = 2 * 64 * (8 / 4) * 128 * 2
    room = 0.6 * 79.6 - 2.5
    expected = (room * GIB - 2 * NUM_32B / 4) / per_token
    assert memory.cached_tokens(QWEN_32B, made.config, H100) == pytest.approx(expected, rel=1e-3)


def test_activations_go_with_what_is_kept() -> None:
    def activations(**changes: object) -> float:
        options = config(tensor=8, sequence=True)
        options = replace(options, memory=MemoryConfig(**changes))
        return planned(options, 128).ranks[0].activations

    layer_input = 2 * 5120 / 8 * 16384  # bf16, over the tensor ranks
    whole = memory.layer_bytes_per_token(QWEN_32B, config(tensor=8, sequence=True)) * 16384
    assert activations(recompute="full") == pytest.approx(64 * layer_input + whole)
    assert activations() == pytest.approx(64 * whole)
    assert activations(recompute="full") < activations(recompute="selective") < activations()


def test_the_first_stages_hold_the_most_micro_batches() -> None:
    ranks = planned(config(tensor=8, pipeline=4, sequence=True), 128).ranks
    first, *_, last = (rank.activations for rank in ranks)
    assert first == pytest.approx(4 * last)
    assert [rank.head > 0 for rank in ranks] == [False, False, False, True]


def test_what_does_not_fit_is_told_what_does() -> None:
    made = planned(config(tensor=2), 16)
    assert not made.fits
    found = suggest.suggestions(QWEN_32B, made)
    assert found
    assert all(suggested.fits for suggested in found)


def test_a_smaller_share_for_the_engine_may_be_enough() -> None:
    options = config(tensor=8, sequence=True)
    options = replace(options, memory=MemoryConfig(recompute="full"))
    made = planned(options, 128)
    assert not made.fits  # 76.0 GiB while it samples
    fraction = suggest.largest_fraction(QWEN_32B, made)
    rollout = replace(options.rollout, memory_fraction=fraction)
    assert planned(replace(options, rollout=rollout), 128).fits
    more = replace(rollout, memory_fraction=fraction + 0.01)
    assert not planned(replace(options, rollout=more), 128).fits
    assert suggest.largest_fraction(QWEN_32B, planned(config(tensor=2), 16)) == 0


@pytest.mark.processes
def test_the_command_prints_a_table_and_names_what_is_missing(tmp_path: Path) -> None:
    save_tokenizer(save_qwen2(tmp_path / "model"))
    longest = AutoConfig.from_pretrained(tmp_path / "model").max_position_embeddings
    (tmp_path / "recipe.yaml").write_text(
        "run_dir: run\nmodel: {path: model}\nparallel: {tensor: 2}\n"
        "data: {train: [{path: train.jsonl}], template: raw, max_prompt_tokens: 8}\n"
        f"rollout: {{max_response_tokens: {longest - 8}}}\n"
    )

    def said(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "megatron_nft", "plan", "recipe.yaml", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    incomplete = said("--gpus", "4")
    assert incomplete.returncode == 1
    assert "missing: data.train: train.jsonl" in incomplete.stdout
    (tmp_path / "train.jsonl").write_text("{}\n")
    done = said("--gpus", "4", "--gpu", "h200")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "model on 4 × h200 (140.4 GiB)" in done.stdout
    assert "tensor 2, pipeline 1, context 1, expert 1, data 2" in done.stdout
    assert "it fits\n" in done.stdout
    refused = said("--gpus", "3")
    assert refused.returncode == 2
    assert "does not divide the 3 processes" in refused.stderr
