"""Which parallel layouts a model can have; light to import."""

from transformers import PretrainedConfig

from megatron_nft.config import ParallelConfig


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
