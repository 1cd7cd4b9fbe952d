"""Which parallel layouts a model can have; light to import."""

from transformers import PretrainedConfig

from checkpoints_conversion.families import sizes_of
from megatron_nft.config import Config, ParallelConfig
from megatron_nft.policy import fp8


def check_layout(hf_config: PretrainedConfig, parallel: ParallelConfig, num_ranks: int) -> None:
    """Refuse a parallel layout that this model cannot have.

    Raises:
        ValueError: the rule that is broken, with the numbers.
    """
    sizes = {
        "attention heads": hf_config.num_attention_heads,
        "key-value heads": hf_config.num_key_value_heads,
        "intermediate size": hf_config.intermediate_size,
    }
    for what, size in sizes.items():
        if size % parallel.tensor:
            raise ValueError(
                f"parallel.tensor={parallel.tensor} does not divide the model's {size} {what}"
            )
    num_stages = parallel.pipeline * parallel.virtual_pipeline
    if hf_config.num_hidden_layers % num_stages:
        raise ValueError(
            f"parallel.pipeline={parallel.pipeline} · parallel.virtual_pipeline="
            f"{parallel.virtual_pipeline} does not divide the model's "
            f"{hf_config.num_hidden_layers} layers"
        )
    num_model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    if num_ranks % num_model_ranks:
        raise ValueError(
            f"parallel.tensor={parallel.tensor} · parallel.pipeline={parallel.pipeline} · "
            f"parallel.context={parallel.context} = {num_model_ranks} does not divide the "
            f"{num_ranks} processes"
        )


def check_fp8(hf_config: PretrainedConfig, config: Config) -> None:
    """Refuse FP8 settings that this model, so split, cannot have.

    Raises:
        ValueError: the rule that is broken, with the numbers.
    """
    if not fp8.is_on(config.fp8):
        return
    per_stage = hf_config.num_hidden_layers // config.parallel.pipeline
    for key in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if config.fp8.first_last_layers_bf16 and getattr(config.fp8, key) > per_stage:
            raise ValueError(
                f"fp8.{key} was {getattr(config.fp8, key)}; it may be at most the {per_stage} "
                "layers of a pipeline rank"
            )
    multiple, tensor = fp8.token_multiple(config.fp8), config.parallel.tensor
    sizes = sizes_of(hf_config)
    widths = {
        "hidden size": hf_config.hidden_size,
        "intermediate size": hf_config.intermediate_size // tensor,
        "queries": sizes.num_heads * sizes.head_dim // tensor,
        "keys": sizes.num_kv_heads * sizes.head_dim // tensor,
    }
    for what, width in widths.items():
        if width % multiple:
            raise ValueError(
                f"fp8.recipe={config.fp8.recipe} multiplies in multiples of {multiple}, but at "
                f"parallel.tensor={tensor} the model's {what} are {width} wide on a rank"
            )
