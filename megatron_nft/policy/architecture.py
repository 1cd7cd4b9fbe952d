"""From a Hugging Face configuration to a Megatron-Core GPTModel."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from checkpoints_conversion.families import family_of, sizes_of
from checkpoints_conversion.mapping import padded_vocab_size
from megatron_nft.config import Config, MemoryConfig, ModelConfig, ParallelConfig
from megatron_nft.policy import fp8, host
from megatron_nft.policy.attention import PackedAttention
from megatron_nft.policy.parallel import EXPERT_TENSOR

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def uses_transformer_engine(model: ModelConfig) -> bool:
    """True where the layers are Transformer Engine's: by default wherever it can run."""
    if model.layers == "torch":
        return False
    can = host.has_cuda() and find_spec("transformer_engine") is not None
    assert can or model.layers == "auto", "preflight lets no such recipe through"
    return can


def transformer_config(hf_config: PretrainedConfig, config: Config) -> TransformerConfig:
    """Megatron's configuration of the same network, in the recipe's layout and dtype."""
    dtype = DTYPES[config.model.dtype]
    has_te = uses_transformer_engine(config.model)
    own_options = family_of(hf_config).options(hf_config)
    has_experts = "num_moe_experts" in own_options
    return TransformerConfig(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_hidden_size=hf_config.intermediate_size,
        num_attention_heads=hf_config.num_attention_heads,
        num_query_groups=hf_config.num_key_value_heads,
        kv_channels=sizes_of(hf_config).head_dim,
        layernorm_epsilon=hf_config.rms_norm_eps,
        normalization="RMSNorm",
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # the schedule neither divides a loss nor scales a gradient: policy/step.py does, once
        calculate_per_token_loss=True,
        use_cpu_initialization=not host.has_cuda(),
        # weights are read from the checkpoint, so that initialising them would be wasted time
        perform_initialization=False,
        # apex's kernel adds a weight's gradient to the float32 buffer without rounding it to bf16
        gradient_accumulation_fusion=host.has_cuda()
        and find_spec("fused_weight_gradient_mlp_cuda") is not None,
        bias_dropout_fusion=host.has_cuda(),
        bias_activation_fusion=host.has_cuda(),
        masked_softmax_fusion=False,
        apply_rope_fusion=has_te,
        persist_layer_norm=has_te,
        moe_grouped_gemm=has_te and has_experts,
        moe_router_dtype="fp32",
        **own_options,
        **_layout_options(config.parallel, dtype),
        **_recompute_options(config.memory, has_experts),
        **fp8.options(config.fp8),
    )


def _layout_options(parallel: ParallelConfig, dtype: torch.dtype) -> dict[str, Any]:
    has_pipeline = parallel.pipeline > 1
    is_interleaved = parallel.virtual_pipeline > 1
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline
        if is_interleaved
        else None,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": EXPERT_TENSOR,
        "sequence_parallel": parallel.sequence,
        "pipeline_dtype": dtype,
        "variable_seq_lengths": has_pipeline,  # no row is padded to the longest
        "moe_token_dispatcher_type": "alltoall",  # what variable_seq_lengths wants, MoE or not
        # Megatron's batched sends may be paired wrongly where a schedule is interleaved, silently
        "batch_p2p_comm": not is_interleaved,
        "deallocate_pipeline_outputs": has_pipeline,
    }


def _recompute_options(memory: MemoryConfig, has_experts: bool) -> dict[str, Any]:
    if memory.recompute == "none":
        return {}
    if memory.recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    # a layer with experts would silently keep what "mlp" names
    names = {"mlp": "moe"} if has_experts else {}
    return {
        "recompute_granularity": "selective",
        "recompute_modules": [names.get(module, module) for module in memory.recompute_modules],
    }


def build_model(
    hf_config: PretrainedConfig, config: TransformerConfig, has_te: bool = False
) -> list[GPTModel]:
    """This rank's chunks of the model, without weights: one per virtual pipeline stage."""
    return [chunk.to(host.device()) for chunk in chunks_of(hf_config, config, has_te)]


def chunks_of(
    hf_config: PretrainedConfig, config: TransformerConfig, has_te: bool = False
) -> list[GPTModel]:
    """The same on torch's default device, such as meta."""
    num_chunks = config.virtual_pipeline_model_parallel_size or 1
    stages = range(num_chunks) if num_chunks > 1 else [None]
    return [_chunk(hf_config, config, has_te, stage) for stage in stages]


def _chunk(
    hf_config: PretrainedConfig, config: TransformerConfig, has_te: bool, stage: int | None
) -> GPTModel:
    where = {"ignore_virtual": False, "vp_stage": stage}
    chunk = GPTModel(
        config,
        block_spec(hf_config, config, has_te, stage),
        vocab_size=padded_vocab_size(hf_config.vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=hf_config.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**where),
        post_process=parallel_state.is_pipeline_last_stage(**where),
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        vp_stage=stage,
        # PackedAttention rotates queries and keys itself
        position_embedding_type="rope" if has_te else "none",
    )
    if has_te:  # Megatron's own knows one scaling, with Llama 3.1's numbers
        chunk.rotary_pos_emb.inv_freq = rope_frequencies(hf_config).to(host.device())
    return chunk


def block_spec(
    hf_config: PretrainedConfig, config: TransformerConfig, has_te: bool, stage: int | None = None
) -> TransformerBlockSubmodules:
    """Transformer Engine's layers, or Megatron's local ones with our attention and norm."""
    num_layers = get_num_layers_to_build(config, vp_stage=stage)
    options = {"num_experts": config.num_moe_experts, "qk_layernorm": config.qk_layernorm}
    if has_te:
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(
            moe_grouped_gemm=config.moe_grouped_gemm, **options
        )
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", **options)
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = ModuleSpec(
        module=PackedAttention, params={"inv_freq": rope_frequencies(hf_config)}
    )
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def rope_frequencies(hf_config: PretrainedConfig) -> torch.Tensor:
    """The rotary frequencies, float32 [D/2]: transformers' own, scaled as the model says.

    Cosines and sines themselves are not scaled: read_hf_config lets no such type in.
    """
    rope = hf_config.rope_parameters
    if (rope_type := rope.get("rope_type", "default")) == "default":
        dim = sizes_of(hf_config).head_dim
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    # here, so that benchmarks of unscaled models need no transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](hf_config, torch.device("cpu"))
    assert scaling == 1.0, f"{rope_type} scales by {scaling}"
    return frequencies


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, marked for Megatron's gradient all-reduce under sequence parallelism.

    Those of queries and keys see a rank's heads alone, and Megatron adds their gradients up over
    the tensor ranks by their names (finalize_model_grads.py), with sequence parallelism or without.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
