"""The GPUs that a plan can be made for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """What a process can have of one GPU's memory."""

    name: str
    memory_gib: float  # as the driver counts it, of the nominal 80, 141 and 192 GB


# nvidia-smi's totals: 81,559, 143,771 and 183,359 MiB
CARDS = {card.name: card for card in (Card("h100", 79.6), Card("h200", 140.4), Card("b200", 179.1))}
CONTEXT_GIB = 2.5  # CUDA's context, NCCL's buffers, what vLLM keeps while it sleeps; an estimate
