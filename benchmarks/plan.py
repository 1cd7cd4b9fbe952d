"""`megatron-nft plan`'s times beside those that were published, and beside those measured here.

    .venv/bin/python benchmarks/plan.py

No GPU is needed and nothing is timed: each row is what the plan says of another program's published
run, with its layout, lengths and numbers of sequences, or of a row of docs/benchmarks.md. Rows that
plan/cards.py was fitted to say so; the others are what the plan can be judged by.

Published  NeMo-RL v0.5.0, docs/about/performance-summary.md, H100, GRPO on OpenMathInstruct-2: two
           passes before a rollout's training (old log-probabilities, and a reference's for its KL),
           mean lengths of answers as there, of prompts what the tokens a second leave
           Megatron-Bridge 25.11, docs/performance-summary.md, FP8 with current scaling
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

warnings.filterwarnings("ignore", category=UserWarning)

from megatron_nft.config import (  # noqa: E402
    Config,
    DataConfig,
    Fp8Config,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
)
from megatron_nft.plan.cards import CARDS  # noqa: E402
from megatron_nft.plan.estimate import Plan, plan_for  # noqa: E402
from megatron_nft.plan.workload import Workload  # noqa: E402

FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
FIELDS += ("num_key_value_heads", "head_dim", "vocab_size", "architecture")
MODELS = {
    "Llama 8B": (4096, 14_336, 32, 32, 8, 128, 128_256, "Llama"),
    "Llama 70B": (8192, 28_672, 80, 64, 8, 128, 128_256, "Llama"),
    "Qwen3 32B": (5120, 25_600, 64, 64, 8, 128, 151_936, "Qwen3"),
    "Qwen3 30B-A3B": (2048, 6144, 48, 32, 4, 128, 151_936, "Qwen3Moe"),
    "0.5B": (896, 4864, 24, 14, 2, 64, 151_936, "Qwen2"),
    "7B": (3584, 18_944, 28, 28, 4, 128, 152_064, "Qwen2"),
    "32B": (5120, 27_648, 64, 40, 8, 128, 152_064, "Qwen2"),
}
MIXTURE = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}


@dataclass(frozen=True)
class Row:
    """What was published or measured: seconds, or tokens a second and GPU."""

    name: str
    plan: Plan
    what: str
    said: float
    planned: float
    is_fitted: bool = False

    def __str__(self) -> str:
        off = f"{100 * (self.planned / self.said - 1):+.0f}%"
        note = "fitted to" if self.is_fitted else ""
        said, planned = (f"{value:,.0f}" for value in (self.said, self.planned))
        return f"{self.name:<60}{self.what:<15}{said:>8}{planned:>9}{off:>6}  {note}".rstrip()


def hf_config(name: str, **changes: Any) -> Any:
    """What a plan reads of a Hugging Face configuration."""
    values = dict(zip(FIELDS, MODELS[name], strict=True)) | changes
    architecture = values.pop("architecture")
    if architecture == "Qwen3Moe":
        values |= MIXTURE | {"norm_topk_prob": True, "router_aux_loss_coef": 0.0}
        values |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    return SimpleNamespace(
        **values,
        architectures=[f"{architecture}ForCausalLM"],
        rms_norm_eps=1e-6,
        max_position_embeddings=131_072,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        tie_word_embeddings=name == "0.5B",
        attention_bias=False,
        mlp_bias=False,
        use_sliding_window=False,
        sliding_window=None,
    )


def nemo_rl(
    name: str,
    num_gpus: int,
    parallel: ParallelConfig,
    tensor: int,
    tokens: tuple[float, float],
    recompute: str = "none",
    servers: int = 0,
) -> Plan:
    """64 questions of 32 answers, four updates, 4,096 tokens at most.

    Args:
        num_gpus: that train.
        tensor: GPUs an engine.
        tokens: of prompts and of answers, means.
    """
    prompt, answer = tokens
    rollout = RolloutConfig(
        engine="remote" if servers else "colocated",
        num_servers=servers or 1,
        max_steps_off_policy=int(servers > 0),
        weight_transfer="nccl" if servers else "files",
        questions=64,
        answers=32,
        max_response_tokens=4096 - int(prompt),
        tensor=tensor,
        memory_fraction=0.6,
    )
    config = Config(
        model=ModelConfig(path=name),
        parallel=parallel,
        memory=MemoryConfig(recompute=recompute, offload=True),
        rollout=rollout,
        optimizer=OptimizerConfig(tokens_per_microbatch=4096, questions_per_minibatch=16),
    )
    workload = Workload(prompt, answer, 1.0, rollout.max_response_tokens, 64, 64, 32, 2)
    return plan_for(hf_config(name), config, num_gpus, CARDS["h100"], workload)


def bridge(
    name: str, num_gpus: int, parallel: ParallelConfig, num_rows: int = 1, gpu: str = "h100"
) -> Plan:
    """128 sequences of 8,192 tokens a step, in FP8."""
    config = Config(
        model=ModelConfig(path=name),
        parallel=parallel,
        fp8=Fp8Config(format="hybrid", recipe="tensorwise"),
        rollout=RolloutConfig(engine="remote", questions=128, answers=1),
        optimizer=OptimizerConfig(
            tokens_per_microbatch=num_rows * 8640, questions_per_minibatch=128
        ),
    )
    workload = Workload(1, 8191, 1.0, 8191, 0, 128, 1, 0)
    return plan_for(hf_config(name), config, num_gpus, CARDS[gpu], workload)


def measured(name: str, num_layers: int, tokens: int, layers: str = "torch", fp8: str = "") -> Plan:
    """`benchmarks/policy_step.py` on one H200: four micro-batches, a mean of 1,000 tokens."""
    config = Config(
        model=ModelConfig(path=name, layers=layers),
        fp8=Fp8Config(format="hybrid" if fp8 else "off", recipe=fp8 or "blockwise"),
        data=DataConfig(max_prompt_tokens=512),
        rollout=RolloutConfig(engine="remote", questions=4, answers=tokens // 1000),
        optimizer=OptimizerConfig(tokens_per_microbatch=tokens, questions_per_minibatch=4),
    )
    workload = Workload(100, 900, 1.0, tokens - 100, 0, 4, tokens // 1000, 1)
    hf = hf_config(name, num_hidden_layers=num_layers)
    return plan_for(hf, config, 1, CARDS["h200"], workload)


def training_rate(plan: Plan) -> float:
    return plan.times.trained_tokens / plan.times.training / plan.num_gpus


def published() -> list[Row]:
    """Of RL steps the seconds, and the tokens a second and GPU that were published with them."""
    rows = []
    dense, halves = ParallelConfig(tensor=4, pipeline=4, sequence=True), ParallelConfig(pipeline=2)
    mixture = ParallelConfig(expert=8)
    for plan, seconds, rate, is_fitted in (
        (nemo_rl("Qwen3 32B", 32, dense, 4, (104, 3251)), 376, 571, True),
        (nemo_rl("Qwen3 32B", 32, dense, 4, (104, 3252), servers=8), 200, 538, True),
        (nemo_rl("Llama 8B", 16, halves, 1, (127, 1019), "full"), 92.8, 1581, False),
        (nemo_rl("Llama 8B", 8, ParallelConfig(), 1, (127, 1123), "full", 8), 64.8, 2478, False),
        (nemo_rl("Qwen3 30B-A3B", 32, mixture, 2, (100, 3196)), 198, 1066, False),
    ):
        kind = "GRPO, one step off" if plan.times.overlaps else "GRPO"
        name = f"NeMo-RL 0.5, {plan.config.model.path}, {plan.times.num_gpus} H100, {kind}"
        rows.append(Row(name, plan, "s a step", seconds, plan.times.total, is_fitted))
        rows.append(Row(name, plan, "tokens/s/GPU", rate, plan.times.tokens_per_gpu, is_fitted))
    big = ParallelConfig(tensor=4, pipeline=8, virtual_pipeline=5, sequence=True)
    for plan, rate, is_fitted in (
        (bridge("Llama 8B", 8, ParallelConfig()), 14_451, False),
        (bridge("Llama 70B", 64, big), 1602, False),
        (bridge("Llama 8B", 8, ParallelConfig(), 2, "b200"), 30_624, True),
    ):
        name = f"Megatron-Bridge 25.11, {plan.config.model.path}, "
        name += f"{plan.num_gpus} {plan.card.name.upper()}, FP8 training"
        rows.append(Row(name, plan, "tokens/s/GPU", rate, training_rate(plan), is_fitted))
    return rows


def own() -> list[Row]:
    """What was measured on an H200; the rates are from all but the old log-probabilities."""
    rows = []
    for name, num_layers, tokens, step, old_logp in (
        ("0.5B", 24, 4096, 28_291, 56_951),
        ("0.5B", 24, 16_384, 94_574, 240_061),
        ("7B", 20, 4096, 13_126, 48_141),
        ("7B", 12, 16_384, 26_061, 82_920),
        ("32B", 8, 4096, 16_091, 60_550),
        ("32B", 5, 16_384, 28_774, 93_424),
    ):
        plan = measured(name, num_layers, tokens)
        title = f"docs/benchmarks.md, {name}, {num_layers} layers, {tokens:,} tokens, H200"
        rows.append(Row(title, plan, "step tokens/s", step, training_rate(plan), True))
        rate = plan.times.trained_tokens / plan.times.old_logp
        rows.append(Row(title, plan, "logp tokens/s", old_logp, rate))
    for fp8, rate in (("", 39_625), ("tensorwise", 51_598), ("blockwise", 47_573)):
        plan = measured("7B", 8, 16_384, "transformer_engine", fp8)
        title = f"docs/benchmarks.md, 7B, 8 layers of TE, {fp8 or 'bf16'}, H200"
        rows.append(Row(title, plan, "step tokens/s", rate, training_rate(plan), True))
    return rows


def main() -> None:
    print(f"{'':<75}{'said':>8}{'planned':>9}")
    for row in (*published(), *own()):
        print(row)


if __name__ == "__main__":
    main()
