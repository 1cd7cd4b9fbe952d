"""Who of a run's processes judges, on how many cores, and when too little could be judged."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch.distributed as dist

from megatron_nft.config import Config
from megatron_nft.policy import host
from megatron_nft.verify.verifier import Verifier


def start_verifier(config: Config, on_progress: Callable[[], object]) -> Verifier | None:
    """Judges only where answers arrive; the cores of a machine are shared by its processes."""
    if config.objective.name == "sft" and not config.evaluate.sets:
        return None
    is_remote = config.rollout.engine == "remote"
    if dist.get_rank() % (dist.get_world_size() if is_remote else config.rollout.tensor):
        return None
    num_local = 1 if is_remote else host.num_local_processes()
    share = max(1, len(os.sched_getaffinity(0)) // num_local)
    options = replace(config.verify, workers=config.verify.workers or share)
    return Verifier(options, on_progress)


def check_rate(what: str, rate: float, config: Config, examples: Sequence[str] = ()) -> None:
    """Raise RuntimeError where too many answers could not be judged; it shows the examples."""
    most = config.verify.max_unverifiable_rate
    if rate > most:
        raise RuntimeError(
            f"{what}: {rate:.1%} of the answers could not be judged; "
            f"verify.max_unverifiable_rate is {most:.1%}"
            + "".join(f"\n  {example}" for example in examples)
        )
