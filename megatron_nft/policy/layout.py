"""Which parallel layouts a model can have; light to import."""

from transformers import PretrainedConfig

from megatron_nft.config import ParallelConfig


def check_layout(hf_config: PretrainedConfig, parallel: ParallelConfig, num_ranks: int) -> None:
    """Refuse a parallel layout that this model cannot have.

    Raises:
        ValueError: the rule that is broken, with the numbers.
    """
    if parallel.pipeline != 1 or parallel.context != 1:
        raise ValueError(
            f"parallel.pipeline={parallel.pipeline}, parallel.context={parallel.context}: "
            "this version runs tensor and data parallelism; set both to 1"
        )
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
    if num_ranks % parallel.tensor:
        raise ValueError(
            f"parallel.tensor={parallel.tensor} does not divide the {num_ranks} processes"
        )
