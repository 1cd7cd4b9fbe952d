"""The GPUs that a plan can be made for, and what they reach: measured or published, source given.

Data sheets are NVIDIA's for the SXM cards. "Measured" is docs/benchmarks.md, "On a GPU": an H200,
2026-11-26. H100 and H200 have the same chip and clocks: operations take the same time on both.
"""

from dataclasses import dataclass, field, replace

TERA, GIGA = 1e12, 1e9

# A matrix product of n rows reaches n / (n + this) of the rates below. Measured: 7B and 32B with
# micro-batches of 4,096 and 16,384 tokens.
HALF_RATE_ROWS = 400
OF_16K = 16_384 / (16_384 + HALF_RATE_ROWS)
# Measured: matrix products of 7B's layers, 16,384 tokens, 76% of a step of 2.51 s (the trace).
H200_BF16 = 690 * TERA / OF_16K
# Measured: the same of 8 layers, 1.06 s in bf16, less what FP8 saved (0.383 s and 0.276 s of a
# step); the quantizing is in it.
H200_FP8 = {
    "tensorwise": 1085 * TERA / OF_16K,
    "delayed": 1085 * TERA / OF_16K,
    "blockwise": 938 * TERA / OF_16K,
}
# Published: Llama3-8B's pre-training on 8 GPUs, B200 over H100, 30,624 to 14,451 tokens/s a GPU in
# FP8 (current scaling), and 29,521 in MXFP8 (Megatron-Bridge 25.11, performance summary).
B200_GAIN, MXFP8_OF_CURRENT_SCALING = 30_624 / 14_451, 29_521 / 30_624


@dataclass(frozen=True)
class Card:
    """What a process can have of one GPU, and how fast; operations and bytes a second."""

    name: str
    memory_gib: float  # as the driver counts it, of the nominal 80, 141 and 192 GB
    bandwidth: float  # of its memory, by the data sheet
    bf16: float  # a layer's matrix products
    fp8: dict[str, float]  # by recipe
    # Causal attention, the model's operations. FlashAttention 3's paper (arXiv 2407.08608: about
    # 600 forward and 550 backward, which does 2.5 times forward's) for TE's layers; measured with
    # FlashAttention 2 (6.4% of a step at a mean of 1,000 tokens) for torch's.
    attention: dict[str, float] = field(
        default_factory=lambda: {"transformer_engine": 480 * TERA, "torch": 205 * TERA}
    )
    nvlink: float = 360 * GIGA  # each way, in a collective within a node; 450 by the data sheet
    network: float = 40 * GIGA  # each way and GPU: 400 Gb/s of InfiniBand, of which 80%
    host: float = 5 * GIGA  # to and from pageable memory, all GPUs of a node at once: an assumption
    float32: float = 50 * TERA  # a matrix product; 67 by the data sheet of H100 and H200


H100 = Card("h100", 79.6, 3.35 * TERA, H200_BF16, H200_FP8)
H200 = replace(H100, name="h200", memory_gib=140.4, bandwidth=4.8 * TERA)
B200 = Card(
    "b200",
    179.1,
    8 * TERA,
    B200_GAIN * H200_BF16,
    {
        "tensorwise": B200_GAIN * H200_FP8["tensorwise"],
        "mxfp8": B200_GAIN * MXFP8_OF_CURRENT_SCALING * H200_FP8["tensorwise"],
    },
    attention={kind: B200_GAIN * rate for kind, rate in H100.attention.items()},
    nvlink=720 * GIGA,
)
# nvidia-smi's totals: 81,559, 143,771 and 183,359 MiB
CARDS = {card.name: card for card in (H100, H200, B200)}
CONTEXT_GIB = 2.5  # CUDA's context, NCCL's buffers, what vLLM keeps while it sleeps; an estimate

# Shares of `bandwidth` that are reached, by what the passes cannot avoid to read and write.
# Measured: what a 7B step has beside products, attention, head and AdamW is 13.1% of it (torch's
# layers), 0.107 µs a token and layer less with TE's; AdamW 3.5% (torch's), half of that with TE.
PASSES = {"transformer_engine": 0.33, "torch": 0.25}
ADAMW = {"transformer_engine": 0.55, "torch": 0.28}
# Measured: a layer takes no less a micro-batch, however small (0.5B at 4,096 tokens), in seconds;
# TE's an assumption.
LAUNCHES = {"transformer_engine": 0.0012, "torch": 0.0025}

# Sampling. Published: NeMo-RL v0.5 (performance summary), Qwen3-32B on H100s, 8 engines of 4 GPUs
# with 256 answers each: 200 s a step with training beside it on as many GPUs, so that neither takes
# longer, and 376 s with one after the other, so that neither takes much less. The values below are
# chosen so that sampling takes about 190 s of it; how they divide it is an assumption.
DECODING = 0.6  # of `bandwidth`, for weights, keys and values
STEP_S, SEQUENCE_S = 0.003, 25e-6  # scheduling, sampling and detokenizing, a step and an answer
ALL_REDUCE_S = 25e-6  # of a step's few rows, however few
# Engines woken or put to sleep, caches given back, data dealt: an assumption
BETWEEN_PHASES_S = 2.0

# Weights to servers, bytes a second, assumptions: through files that all nodes see; by gloo
FILES, GLOO = 2 * GIGA, 2 * GIGA
