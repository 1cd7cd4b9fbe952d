"""Bytes of a GPU, by what they are for, in training and while answers are sampled.

Weights, gradients and optimizer are exact, the engine's weights but for norms and biases.
Activations are what a layer keeps for backward by the formulas below, an estimate: the allocator's
gaps and the kernels' own buffers are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoints_conversion.families import sizes_of
from megatron_nft.config import Config
from megatron_nft.plan.cards import CONTEXT_GIB, Card
from megatron_nft.plan.parameters import Held
from megatron_nft.plan.shape import bytes_of, has_engine, sequence_ranks
from megatron_nft.policy.flops import layer_matmul_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GIB = 2**30
GRADIENT_BYTES = 4  # float32, in Megatron's buffers
GPU_CHUNK_CELLS = 2**28  # of logits at once: policy/logprobs.py
CELL_BYTES = 4 + 2  # a chunk's logits in float32, their gradient in the weights' dtype


@dataclass(frozen=True)
class Memory:
    """Of one rank, in bytes."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float  # at the most of a step's moments
    head: float  # 0 on stages without it
    engine: float  # what vLLM may have while it samples; 0: engines are elsewhere
    offloaded: bool

    @property
    def training(self) -> float:
        parts = self.weights, self.gradients, self.optimizer, self.activations, self.head
        return sum(parts) + CONTEXT_GIB * GIB

    @property
    def sampling(self) -> float:
        kept = self.weights + (0 if self.offloaded else self.gradients + self.optimizer)
        return kept + self.engine + CONTEXT_GIB * GIB

    @property
    def peak(self) -> float:
        return max(self.training, self.sampling)


def memory_of(
    hf_config: PretrainedConfig, config: Config, held: Held, num_ranks: int, card: Card
) -> Memory:
    """What one rank of a pipeline stage needs."""
    parallel, last = config.parallel, config.parallel.pipeline - 1
    bytes_each = bytes_of(config)
    is_beside = config.rollout.engine == "colocated" and has_engine(config)
    tokens = longest_row(config) / parallel.context
    return Memory(
        stage=held.stage,
        weights=held.total * bytes_each,
        gradients=held.total * GRADIENT_BYTES,
        optimizer=_optimizer(config, held, num_ranks),
        activations=_activations(hf_config, config, held.stage, tokens, bytes_each),
        head=_head(hf_config, config, tokens) if held.stage == last else 0.0,
        engine=_share(config, card) if is_beside else 0.0,
        offloaded=config.memory.offload,
    )


def _share(config: Config, card: Card) -> float:
    """Bytes of a GPU that vLLM may have."""
    return config.rollout.memory_fraction * card.memory_gib * GIB


def longest_row(config: Config) -> int:
    """Tokens of the largest micro-batch, over the context-parallel ranks together."""
    return max(config.optimizer.tokens_per_microbatch, config.longest)


def _optimizer(config: Config, held: Held, num_ranks: int) -> float:
    """AdamW's two moments in float32, and main parameters where the weights are in bf16."""
    parallel = config.parallel
    each = 8 if config.model.dtype == "float32" else 12
    if not parallel.distributed_optimizer:
        return held.total * each
    per_stage = num_ranks // parallel.pipeline
    dense, expert = held.dense / (per_stage // parallel.tensor), held.expert
    if expert:
        expert /= max(1, per_stage // parallel.expert)
    return (dense + expert) * each


def layer_bytes_per_token(hf_config: PretrainedConfig, config: Config, bytes_each: int) -> float:
    """What a layer keeps for backward of each token, with nothing computed again.

    Inputs of the two norms and of the matrix products behind them; queries, keys and values before
    and after their rotation; what attention gives; the gate, up and product of the MLP. Norms and
    their outputs are shared out by sequence parallelism, the rest by tensor parallelism.
    """
    return _attention_part(hf_config, config, bytes_each) + _mlp_part(hf_config, config, bytes_each)


def _attention_part(hf_config: PretrainedConfig, config: Config, bytes_each: int) -> float:
    sizes, parallel, shared = sizes_of(hf_config), config.parallel, sequence_ranks(config)
    heads = (3 * sizes.queries + 4 * sizes.keys) / parallel.tensor
    return bytes_each * (4 * sizes.hidden / shared + heads)


def _mlp_part(hf_config: PretrainedConfig, config: Config, bytes_each: int) -> float:
    sizes, parallel = sizes_of(hf_config), config.parallel
    if not sizes.num_experts:
        return bytes_each * 3 * sizes.ffn / parallel.tensor
    # a token goes to several experts, each of them whole; ranks get as many as they send
    chosen = hf_config.num_experts_per_tok / sequence_ranks(config)
    return bytes_each * chosen * (3 * sizes.ffn + 2 * sizes.hidden)


def _activations(
    hf_config: PretrainedConfig, config: Config, stage: int, tokens: float, bytes_each: int
) -> float:
    """Of all micro-batches that a stage holds at once: the first one the most of them."""
    parallel, sizes = config.parallel, sizes_of(hf_config)
    whole = layer_bytes_per_token(hf_config, config, bytes_each)
    if config.memory.recompute == "full":
        kept, once = bytes_each * sizes.hidden / sequence_ranks(config), whole
    elif config.memory.recompute == "selective" and "mlp" in config.memory.recompute_modules:
        part = _mlp_part(hf_config, config, bytes_each)
        kept, once = whole - part, part
    else:
        kept, once = whole, 0.0
    num_held = parallel.pipeline - stage
    if parallel.virtual_pipeline > 1:
        # the interleaved schedule: (p − 1) / v micro-batches more than p on the first stage
        num_held += (parallel.pipeline - 1) / parallel.virtual_pipeline
    num_layers = sizes.num_layers / parallel.pipeline
    return tokens * (num_held * num_layers * kept + once)


def _head(hf_config: PretrainedConfig, config: Config, tokens: float) -> float:
    rows = hf_config.vocab_size / config.parallel.tensor
    cells = min(GPU_CHUNK_CELLS, rows * tokens)
    return cells * CELL_BYTES + tokens * hf_config.hidden_size * 4


def num_parameters(hf_config: PretrainedConfig) -> float:
    """Of all of a model's matrices."""
    layers = hf_config.num_hidden_layers * layer_parameters(hf_config)
    return layers + _num_in_tables(hf_config)


def _num_in_tables(hf_config: PretrainedConfig) -> float:
    """Of embedding and head."""
    tables = 1 if hf_config.tie_word_embeddings else 2
    return tables * hf_config.vocab_size * hf_config.hidden_size


def engine_weights(hf_config: PretrainedConfig, config: Config) -> float:
    """Bytes of an engine's weights on each of its GPUs."""
    tables = _num_in_tables(hf_config)
    each = 1 if config.rollout.quantization == "fp8" else bytes_of(config)
    layers = num_parameters(hf_config) - tables
    return (layers * each + tables * bytes_of(config)) / config.rollout.tensor


def layer_parameters(hf_config: PretrainedConfig) -> int:
    """Of one layer, all experts; layer_matmul_parameters has those that a token sees."""
    sizes = sizes_of(hf_config)
    seen = layer_matmul_parameters(hf_config)
    if not sizes.num_experts:
        return seen
    others = sizes.num_experts - hf_config.num_experts_per_tok
    return seen + others * 3 * sizes.hidden * sizes.ffn


def cached_tokens(hf_config: PretrainedConfig, config: Config, card: Card) -> float:
    """Tokens whose keys and values an engine's GPU has room for; below 0: not even its weights."""
    sizes = sizes_of(hf_config)
    heads = max(1, sizes.num_kv_heads / config.rollout.tensor)
    each = 2 * sizes.num_layers * heads * sizes.head_dim * bytes_of(config)
    room = _share(config, card) - CONTEXT_GIB * GIB
    return (room - engine_weights(hf_config, config)) / each
