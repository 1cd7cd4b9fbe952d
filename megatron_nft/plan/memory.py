"""Bytes of a GPU, by what they are for, in training and while answers are sampled.

Weights, gradients and optimizer are exact, the engine's weights but for norms and biases.
Activations are what a layer keeps for backward by the formulas below, an estimate: the allocator's
gaps and the kernels' own buffers are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoints_conversion.families import family_of, sizes_of
from megatron_nft.config import Config
from megatron_nft.plan.cards import CONTEXT_GIB, Card
from megatron_nft.plan.parameters import Held
from megatron_nft.plan.shape import bytes_of, has_engine, kind_of, sequence_ranks
from megatron_nft.policy.flops import layer_matmul_parameters
from megatron_nft.policy.logprobs import MAX_CHUNK_TOKENS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GIB = 2**30
GRADIENT_BYTES = 4  # float32, in Megatron's buffers
GPU_CHUNK_CELLS = 2**28  # of logits at once: policy/logprobs.py
CELL_BYTES = 4  # a chunk's logits in float32; their gradient is made in place


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
    def allocated(self) -> float:
        """By torch in training: all but the CUDA context and the allocator's gaps."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head

    @property
    def training(self) -> float:
        return self.allocated + CONTEXT_GIB * GIB

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
        activations=_activations(hf_config, config, held.stage, tokens),
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


def layer_bytes_per_token(hf_config: PretrainedConfig, config: Config) -> float:
    """What a layer keeps for backward of each token, with nothing computed again.

    Inputs of the two norms and of the matrix products behind them; what attention takes, gives and
    divided by; the gate, up and product of the MLP. Norms and their outputs are shared out by
    sequence parallelism, the rest by tensor parallelism. Exact for bfloat16 and `model.layers:
    torch` (tests/test_plan_memory.py), and taken for Transformer Engine's and float32 too.
    """
    return _attention_part(hf_config, config) + _mlp_part(hf_config, config)


def _attention_part(hf_config: PretrainedConfig, config: Config) -> float:
    sizes, shared, bytes_each = sizes_of(hf_config), sequence_ranks(config), bytes_of(config)
    heads = bytes_each * _attended(hf_config, config) + 4 * sizes.num_heads  # those in float32
    return bytes_each * 4 * sizes.hidden / shared + heads / config.parallel.tensor


def _attended(hf_config: PretrainedConfig, config: Config) -> float:
    """Numbers of all heads that attention keeps of a token: its own and their first forms.

    Queries, keys and values come in one tensor, which is kept as long as one of them is.
    """
    sizes, parallel = sizes_of(hf_config), config.parallel
    both, as_they_came = 2 * sizes.queries, sizes.queries + 2 * sizes.keys  # queries and outputs
    has_norms = family_of(hf_config).options(hf_config).get("qk_layernorm", False)
    # queries that lie apart, group by group, are copied for their norm
    copied = sizes.queries if has_norms and sizes.num_kv_heads > parallel.tensor else 0
    if parallel.context == 1 or kind_of(config) != "torch":
        return both + as_they_came + sizes.keys + copied
    # gathered from all ranks, those that each of a rank's two chunks of a sequence sees
    gathered = 2 * sizes.keys * (parallel.context + 0.5)
    return both + gathered + (as_they_came + copied if has_norms else 0)


def _mlp_part(hf_config: PretrainedConfig, config: Config) -> float:
    sizes, parallel, bytes_each = sizes_of(hf_config), config.parallel, bytes_of(config)
    if not sizes.num_experts:
        return bytes_each * 3 * sizes.ffn / parallel.tensor
    # a token goes to several experts, each of them whole; ranks get as many as they send
    chosen = hf_config.num_experts_per_tok / sequence_ranks(config)
    return bytes_each * chosen * (3 * sizes.ffn + 2 * sizes.hidden)


def kept_and_once(hf_config: PretrainedConfig, config: Config) -> tuple[float, float]:
    """Bytes of a token: what each layer keeps for backward, and what one that is computed again
    holds besides, meanwhile.
    """
    whole = layer_bytes_per_token(hf_config, config)
    if config.memory.recompute == "full":
        return bytes_of(config) * sizes_of(hf_config).hidden / sequence_ranks(config), whole
    if config.memory.recompute == "selective" and "mlp" in config.memory.recompute_modules:
        part = _mlp_part(hf_config, config)
        return whole - part, part
    return whole, 0.0


def _activations(hf_config: PretrainedConfig, config: Config, stage: int, tokens: float) -> float:
    """Of all micro-batches that a stage holds at once: the first one the most of them."""
    parallel = config.parallel
    kept, once = kept_and_once(hf_config, config)
    num_held = parallel.pipeline - stage
    if parallel.virtual_pipeline > 1:
        # the interleaved schedule: (p − 1) / v micro-batches more than p on the first stage
        num_held += (parallel.pipeline - 1) / parallel.virtual_pipeline
    num_layers = sizes_of(hf_config).num_layers / parallel.pipeline
    return tokens * (num_held * num_layers * kept + once)


def _head(hf_config: PretrainedConfig, config: Config, tokens: float) -> float:
    """A chunk's logits, and the states that predict, with their gradient: policy/logprobs.py."""
    rows = hf_config.vocab_size / config.parallel.tensor
    cells = min(GPU_CHUNK_CELLS, rows * min(tokens, MAX_CHUNK_TOKENS))
    return cells * CELL_BYTES + tokens * hf_config.hidden_size * 2 * bytes_of(config)


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
