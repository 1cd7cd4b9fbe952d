"""A recipe's layout, memory and FP8 settings as Megatron-Core is told of them."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toys import LLAMA3_ROPE
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3MoeConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from checkpoints_conversion.live import _whole_name
from megatron_nft.config import Config, Fp8Config, MemoryConfig, ModelConfig, ParallelConfig
from megatron_nft.policy import fp8
from megatron_nft.policy.architecture import rope_frequencies, transformer_config
from megatron_nft.policy.layout import check_fp8, check_layout
from megatron_nft.policy.step import row_layout
from megatron_nft.preflight import check_fp8_hardware

HF_CONFIG = Qwen2Config(
    architectures=["Qwen2ForCausalLM"],
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
MOE_CONFIG = Qwen3MoeConfig(
    architectures=["Qwen3MoeForCausalLM"],
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=24,
    head_dim=16,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=6,
    num_experts_per_tok=2,
    norm_topk_prob=False,
)
FP8 = Fp8Config(
    "hybrid", "tensorwise", margin=2, wgrad=False, first_last_layers_bf16=True,
    num_layers_at_start_in_bf16=2, amax_history_len=16, amax_compute_algo="most_recent",
)  # fmt: skip


def _told(config: Config, *keys: str, hf_config: PretrainedConfig = HF_CONFIG) -> list[Any]:
    found = transformer_config(hf_config, config)
    return [getattr(found, key) for key in keys]


def test_fp8_settings_arrive() -> None:
    keys = ("fp8", "fp8_recipe", "fp8_margin", "fp8_wgrad", "first_last_layers_bf16", "fp8_param")
    assert _told(Config(fp8=FP8), *keys) == ["hybrid", "tensorwise", 2, False, True, False]
    keys = ("num_layers_at_start_in_bf16", "fp8_amax_history_len", "fp8_amax_compute_algo")
    assert _told(Config(fp8=FP8), *keys) == [2, 16, "most_recent"]
    assert _told(Config(), "fp8") == [None]


def test_blockwise_wants_its_variable_before_anything_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, blockwise = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES", Fp8Config("e4m3", "blockwise")
    assert fp8.environment(blockwise) == {name: "1"}
    assert fp8.environment(FP8) == fp8.environment(Fp8Config()) == {}
    monkeypatch.setenv(name, "1")
    fp8.check_environment(blockwise)
    monkeypatch.setenv(name, "0")
    fp8.check_environment(FP8)
    with pytest.raises(ValueError, match=f"fp8.recipe=blockwise needs {name}=1 .*it was '0'"):
        fp8.check_environment(blockwise)


@pytest.mark.parametrize(
    ("options", "parallel", "multiple"),
    [
        (Fp8Config(), ParallelConfig(), 1),
        (Fp8Config(), ParallelConfig(tensor=4), 1),
        (Fp8Config(), ParallelConfig(tensor=4, sequence=True), 4),
        (Fp8Config("hybrid", "blockwise"), ParallelConfig(tensor=4), 16),
        (Fp8Config("hybrid", "mxfp8"), ParallelConfig(), 32),
        (Fp8Config("e4m3", "tensorwise"), ParallelConfig(tensor=4, sequence=True), 64),
    ],
)
def test_rows_are_multiples_of_what_fp8_and_sequence_parallelism_take(
    options: Fp8Config, parallel: ParallelConfig, multiple: int
) -> None:
    layout = row_layout(Config(fp8=options, parallel=parallel))
    assert layout.multiple == multiple
    assert sum(layout.spans([5, 11, 3])) % multiple == 0


@pytest.mark.parametrize(
    ("options", "parallel", "words"),
    [
        (replace(FP8, num_layers_at_end_in_bf16=3), {"pipeline": 2}, "it may be at most the 2 lay"),
        (FP8, {"tensor": 2}, "parallel.tensor=2 the model's intermediate size are 24 wide"),
        (replace(FP8, recipe="mxfp8"), {}, "in multiples of 32, .* intermediate size are 48 wide"),
    ],
)
def test_fp8_that_cannot_be_is_refused(
    options: Fp8Config, parallel: dict[str, int], words: str
) -> None:
    config = Config(fp8=options, parallel=ParallelConfig(**parallel))
    with pytest.raises(ValueError, match=words):
        check_fp8(HF_CONFIG, config)
    check_fp8(HF_CONFIG, replace(config, fp8=Fp8Config()))
    check_fp8(HF_CONFIG, Config(fp8=FP8))


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "is_right"),
    [
        ("mxfp8", (10, 0), "13.0", True),
        ("mxfp8", (9, 0), "13.0", False),
        ("blockwise", (9, 0), "12.9", True),
        ("blockwise", (9, 0), "12.8", False),
        ("tensorwise", (9, 0), "12.6", True),
    ],
)
def test_fp8_recipes_are_checked_against_the_hardware(
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    capability: tuple[int, int],
    cuda: str,
    is_right: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with nullcontext() if is_right else pytest.raises(ValueError, match=f"fp8.recipe={recipe}"):
        check_fp8_hardware(Fp8Config("hybrid", recipe))
    check_fp8_hardware(Fp8Config("off", recipe))


def test_recomputation_arrives() -> None:
    keys = ("recompute_granularity", "recompute_method", "recompute_num_layers")
    assert _told(Config(), *keys) == [None, None, None]
    assert _told(Config(memory=MemoryConfig("full")), *keys) == ["full", "uniform", 1]
    some = Config(memory=MemoryConfig("selective", ["mlp", "core_attn"]))
    assert _told(some, "recompute_granularity", "recompute_modules") == [
        "selective",
        ["mlp", "core_attn"],
    ]


def test_mlps_with_experts_are_recomputed_under_their_own_name() -> None:
    """Megatron would silently keep them under the name of a dense MLP."""
    some = Config(memory=MemoryConfig("selective", ["mlp", "core_attn"]))
    assert _told(some, "recompute_modules", hf_config=MOE_CONFIG) == [["moe", "core_attn"]]


def test_a_familys_options_arrive() -> None:
    assert _told(Config(), "add_qkv_bias", "qk_layernorm", "num_moe_experts") == [True, False, None]
    keys = ("add_qkv_bias", "qk_layernorm", "num_moe_experts", "moe_router_topk")
    assert _told(Config(), *keys, hf_config=MOE_CONFIG) == [False, True, 6, 2]
    keys = ("moe_ffn_hidden_size", "kv_channels", "moe_aux_loss_coeff", "moe_router_pre_softmax")
    assert _told(Config(), *keys, hf_config=MOE_CONFIG) == [24, 16, 0.0, True]
    parallel = ParallelConfig(tensor=2, sequence=True, expert=3)
    keys = ("expert_model_parallel_size", "expert_tensor_parallel_size")
    assert _told(Config(parallel=parallel), *keys, hf_config=MOE_CONFIG) == [3, 1]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        LLAMA3_ROPE,
    ],
)
def test_rotary_frequencies_are_those_of_transformers(rope: dict[str, Any]) -> None:
    hf_config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=64,
        num_attention_heads=4,
        head_dim=32,
        rope_parameters=rope,
    )
    expected = LlamaRotaryEmbedding(hf_config).inv_freq
    assert torch.equal(rope_frequencies(hf_config), expected)


@pytest.mark.parametrize(
    ("hf_config", "parallel", "num_ranks", "words"),
    [
        (HF_CONFIG, {"tensor": 4}, 4, "tensor=4 does not divide the model's 2 key-value heads"),
        (HF_CONFIG, {"pipeline": 3}, 3, "pipeline=3 · .* does not divide the model's 4 layers"),
        (HF_CONFIG, {"tensor": 2, "context": 2}, 6, "= 4 does not divide the 6 processes"),
        (HF_CONFIG, {"expert": 2}, 2, "expert=2, but the model has no experts"),
        (MOE_CONFIG, {"expert": 4}, 4, "expert=4 does not divide the model's 6 experts"),
        (MOE_CONFIG, {"expert": 3}, 4, "expert=3 does not divide the 4 processes of each"),
        (MOE_CONFIG, {"expert": 2, "pipeline": 2}, 2, "expert=2 does not divide the 1 processes"),
        (MOE_CONFIG, {"tensor": 2}, 2, "set parallel.sequence=true"),
    ],
)
def test_a_layout_that_a_model_cannot_have_is_refused(
    hf_config: PretrainedConfig, parallel: dict[str, int], num_ranks: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        check_layout(hf_config, ParallelConfig(**parallel), num_ranks)


def test_experts_may_be_spread_over_the_tensor_and_the_context_ranks() -> None:
    parallel = ParallelConfig(tensor=2, sequence=True, context=2, pipeline=2, expert=6)
    check_layout(MOE_CONFIG, parallel, 24)
    assert parallel.least_processes == 24
    assert replace(parallel, expert=2).least_processes == 8
    assert replace(parallel, expert=1).least_processes == 8


def test_pipelines_take_rows_of_any_length() -> None:
    parallel = ParallelConfig(pipeline=2, virtual_pipeline=2)
    keys = ("variable_seq_lengths", "batch_p2p_comm", "pipeline_dtype")
    config = Config(parallel=parallel, model=ModelConfig(dtype="float32"))
    assert _told(config, *keys) == [True, False, torch.float32]
    assert _told(Config(), "variable_seq_lengths") == [False]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("decoder.layers.1.mlp.linear_fc2.weight", "decoder.layers.6.mlp.linear_fc2.weight"),
        (
            "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
            "decoder.layers.5.input_layernorm.weight",
        ),
        (
            "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
            "decoder.layers.6.pre_mlp_layernorm.weight",
        ),
        ("decoder.final_layernorm.weight", "decoder.final_layernorm.weight"),
        (
            "decoder.layers.0.self_attention.q_layernorm.weight",
            "decoder.layers.5.self_attention.q_layernorm.weight",
        ),
        ("decoder.layers.1.pre_mlp_layernorm.weight", "decoder.layers.6.pre_mlp_layernorm.weight"),
        ("decoder.layers.1.mlp.router.weight", "decoder.layers.6.mlp.router.weight"),
        (
            "decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight",
            "decoder.layers.5.mlp.experts.13.linear_fc2.weight",
        ),
        (
            "decoder.layers.1.mlp.experts.linear_fc1.weight0",
            "decoder.layers.6.mlp.experts.12.linear_fc1.weight",
        ),
    ],
)
def test_names_of_later_ranks_and_of_transformer_engines_layers(name: str, expected: str) -> None:
    mlp = SimpleNamespace(local_expert_indices=[12, 13])
    layers = [SimpleNamespace(layer_number=number, mlp=mlp) for number in (6, 7)]
    assert _whole_name(name, SimpleNamespace(decoder=SimpleNamespace(layers=layers))) == expected
