"""What several parts of a plan ask of a recipe: sizes of numbers, who lies where, which rates."""

from megatron_nft.config import Config
from megatron_nft.plan.cards import Card

GPUS_A_NODE = 8


def kind_of(config: Config) -> str:
    """Of the layers, on a machine that has Transformer Engine."""
    return "torch" if config.model.layers == "torch" else "transformer_engine"


def bytes_of(config: Config) -> int:
    """Of a weight or an activation."""
    return 4 if config.model.dtype == "float32" else 2


def sequence_ranks(config: Config) -> int:
    """Ranks that share out the rows between the products."""
    return config.parallel.tensor if config.parallel.sequence else 1


def samples(config: Config) -> bool:
    return config.objective.name != "sft"


def has_engine(config: Config) -> bool:
    """For rollouts, or for evaluations alone."""
    return samples(config) or bool(config.evaluate.sets)


def is_within_node(config: Config, kind: str, num_gpus: int) -> bool:
    """Whether the ranks of a kind are on one node; Megatron's order: tensor, context, data, stages.

    Args:
        kind: tensor | context | expert | data (with context; what has the same weights) | stages.
    """
    parallel = config.parallel
    reach = {
        "tensor": parallel.tensor,
        "context": parallel.tensor * parallel.context,
        "expert": parallel.expert,
        "data": num_gpus // parallel.pipeline,
        "stages": num_gpus,
    }
    return reach[kind] <= GPUS_A_NODE


def link(config: Config, card: Card, kind: str, num_gpus: int) -> float:
    """Bytes a second that a rank sends to others of a kind."""
    return card.nvlink if is_within_node(config, kind, num_gpus) else card.network


def rate(config: Config, card: Card) -> float:
    """Operations a second of products outside of FP8."""
    return card.float32 if config.model.dtype == "float32" else card.bf16
