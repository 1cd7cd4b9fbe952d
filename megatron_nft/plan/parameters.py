"""How many parameters each rank holds, counted on the real model's own chunks, without memory.

Every distinct rank's model is built on torch's meta device, under a process group that pretends to
have the real size: Megatron-Core decides what lies where, as it will in the run.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_nft.config import Config, Fp8Config, ParallelConfig
from megatron_nft.policy import host
from megatron_nft.policy.architecture import chunks_of, transformer_config
from megatron_nft.policy.parallel import make_groups

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Held:
    """Parameters of one rank; ranks of a pipeline stage are alike."""

    stage: int
    dense: int  # that data- and context-parallel ranks have as well
    expert: int  # that the ranks with the same experts have as well

    @property
    def total(self) -> int:
        return self.dense + self.expert


def held_by_ranks(hf_config: PretrainedConfig, config: Config, num_ranks: int) -> list[Held]:
    """One entry a pipeline stage, by the first rank of each.

    Raises:
        AssertionError: this process has a process group already.
    """
    assert not dist.is_initialized(), "a plan is made in a process of its own"
    host.prepare()
    num_stages = config.parallel.pipeline
    # Transformer Engine's layers hold the same parameters, and cannot be built where it is not
    config = replace(config, model=replace(config.model, layers="torch"), fp8=Fp8Config())
    per_stage, found = num_ranks // num_stages, []
    for stage in range(num_stages):
        if 1 < stage < num_stages - 1:
            found.append(replace(found[1], stage=stage))  # stages in the middle are alike
        else:
            found.append(_held(hf_config, config, stage, per_stage * stage, num_ranks))
    return found


def _held(
    hf_config: PretrainedConfig, config: Config, stage: int, rank: int, num_ranks: int
) -> Held:
    with pretended(config.parallel, rank, num_ranks), torch.device("meta"), _quiet():
        model_config = transformer_config(hf_config, config)
        # else Megatron makes them, and tied copies of the embedding, on a GPU where there is one
        model_config.use_cpu_initialization = model_config.init_model_with_meta_device = True
        chunks = chunks_of(hf_config, model_config)
        parameters = [p for chunk in chunks for p in chunk.parameters()]
    # Megatron's own mark of what the data-parallel ranks do not share
    expert = sum(p.numel() for p in parameters if not getattr(p, "allreduce", True))
    return Held(stage, sum(p.numel() for p in parameters) - expert, expert)


@contextlib.contextmanager
def pretended(parallel: ParallelConfig, rank: int, num_ranks: int) -> Iterator[None]:
    """As if this were that rank of so many."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        make_groups(parallel, has_gloo=False)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Megatron speaks of each model that it builds."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
