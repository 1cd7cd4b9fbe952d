"""From a Hugging Face configuration to a Megatron-Core GPTModel."""

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig

from checkpoints_conversion.families import sizes_of
from checkpoints_conversion.mapping import padded_vocab_size
from megatron_nft.config import ModelConfig, ParallelConfig
from megatron_nft.policy import host
from megatron_nft.policy.attention import PackedAttention

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def transformer_config(
    hf_config: PretrainedConfig, model: ModelConfig, parallel: ParallelConfig
) -> TransformerConfig:
    """Megatron's configuration of the same network, in the recipe's layout and dtype."""
    dtype = DTYPES[model.dtype]
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
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        variable_seq_lengths=parallel.pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # what variable_seq_lengths wants, MoE or not
        # the schedule neither divides a loss nor scales a gradient: policy/step.py does, once
        calculate_per_token_loss=True,
        use_cpu_initialization=not host.has_cuda(),
        # weights are read from the checkpoint, so that initialising them would be wasted time
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=host.has_cuda(),
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def build_model(hf_config: PretrainedConfig, config: TransformerConfig) -> list[GPTModel]:
    """This rank's chunks of the model, without weights: one per virtual pipeline stage."""
    model = GPTModel(
        config,
        block_spec(hf_config, config),
        vocab_size=padded_vocab_size(hf_config.vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=hf_config.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        position_embedding_type="none",  # PackedAttention rotates queries and keys itself
    )
    return [model.to(host.device())]


def block_spec(
    hf_config: PretrainedConfig, config: TransformerConfig
) -> TransformerBlockSubmodules:
    """Megatron's local layer with our attention and a norm that knows sequence parallelism."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = ModuleSpec(
        module=PackedAttention, params={"inv_freq": rope_frequencies(hf_config)}
    )
    num_layers = get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def rope_frequencies(hf_config: PretrainedConfig) -> torch.Tensor:
    """The rotary frequencies float32 [D/2] of the default rope, all that read_hf_config lets in."""
    theta, dim = hf_config.rope_parameters["rope_theta"], sizes_of(hf_config).head_dim
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, marked for Megatron's gradient all-reduce under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
