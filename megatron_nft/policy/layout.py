"""Which parallel layouts a model can have; light to import."""

from transformers import PretrainedConfig

from checkpoints_conversion.families import sizes_of
from checkpoints_conversion.mapping import Sizes
from megatron_nft.config import Config, ParallelConfig
from megatron_nft.policy import fp8


def check_layout(hf_config: PretrainedConfig, parallel: ParallelConfig, num_ranks: int) -> None:
    """Refuse a parallel layout that this model cannot have.

    Raises:
        ValueError: the rule that is broken, with the numbers.
    """
    sizes = sizes_of(hf_config)
    _check_tensor(sizes, parallel)
    _check_experts(sizes, parallel)
    num_stages = parallel.pipeline * parallel.virtual_pipeline
    if sizes.num_layers % num_stages:
        raise ValueError(
            f"parallel.pipeline={parallel.pipeline} · parallel.virtual_pipeline="
            f"{parallel.virtual_pipeline} does not divide the model's {sizes.num_layers} layers"
        )
    num_model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    if num_ranks % num_model_ranks:
        raise ValueError(
            f"parallel.tensor={parallel.tensor} · parallel.pipeline={parallel.pipeline} · "
            f"parallel.context={parallel.context} = {num_model_ranks} does not divide the "
            f"{num_ranks} processes"
        )
    if num_ranks // parallel.pipeline % parallel.expert:
        raise ValueError(
            f"parallel.expert={parallel.expert} does not divide the "
            f"{num_ranks // parallel.pipeline} processes of each pipeline rank"
        )


def _check_tensor(sizes: Sizes, parallel: ParallelConfig) -> None:
    widths = {"attention heads": sizes.num_heads, "key-value heads": sizes.num_kv_heads}
    if not sizes.num_experts:  # experts stay whole
        widths["intermediate size"] = sizes.ffn
    for what, width in widths.items():
        if width % parallel.tensor:
            raise ValueError(
                f"parallel.tensor={parallel.tensor} does not divide the model's {width} {what}"
            )


def _check_experts(sizes: Sizes, parallel: ParallelConfig) -> None:
    if not sizes.num_experts:
        if parallel.expert > 1:
            raise ValueError(
                f"parallel.expert={parallel.expert}, but the model has no experts; set it to 1"
            )
        return
    if sizes.num_experts % parallel.expert:
        raise ValueError(
            f"parallel.expert={parallel.expert} does not divide the model's {sizes.num_experts} "
            "experts"
        )
    if parallel.tensor > 1 and not parallel.sequence:
        raise ValueError(
            f"parallel.tensor={parallel.tensor} without parallel.sequence: Megatron-Core trains a "
            "mixture of experts only with it; set parallel.sequence=true"
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
        "hidden size": sizes.hidden,
        "intermediate size": sizes.ffn if sizes.num_experts else sizes.ffn // tensor,
        "queries": sizes.queries // tensor,
        "keys": sizes.keys // tensor,
    }
    for what, width in widths.items():
        if width % multiple:
            raise ValueError(
                f"fp8.recipe={config.fp8.recipe} multiplies in multiples of {multiple}, but at "
                f"parallel.tensor={tensor} the model's {what} are {width} wide on a rank"
            )
