"""Megatron-Core's distributed checkpoint, written so that one rank's failure is every rank's.

Megatron's own save leaves the other ranks waiting for ever where rank 0 cannot write the index, as
on a full disk. Here its plan, its writer and its index are used one by one, and a rank that fails
between two collectives says so in the next one.

What several data-parallel ranks hold, each of them writes and reads a part of.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from megatron_nft.policy import host
from megatron_nft.policy.checkpoint_files import File, describe

SPARE, ITEM_BYTES = 1.05, 2048  # beside the numbers: of all; of a tensor, whose frame has 1.5 kB


class Plan(TorchDistSaveShardedStrategy):
    """Who writes what: Megatron's strategy, stopped where it would begin to write."""

    writer: FileSystemWriterAsync
    index: Metadata | None  # on rank 0
    trouble: str | None = None  # of this rank

    def _get_save_and_finalize_callbacks(
        self, writer: FileSystemWriterAsync, planned: tuple[Any, ...], async_strategy: str
    ) -> AsyncRequest:
        self.writer, self.index = writer, planned[1]
        return AsyncRequest(None, (), [])

    @property
    def num_bytes(self) -> int:
        """That this rank's files will have, and a little more."""
        written = [items for *_, items in self.writer.write_buckets]
        sizes = [data.getbuffer().nbytes for objects, _ in written for _, data in objects]
        sizes += [tensor.nbytes for _, tensors in written for _, tensor in tensors]
        return int(SPARE * sum(sizes)) + ITEM_BYTES * len(sizes)


@dataclass
class Written:
    """What a rank wrote: Megatron's account of it, and its files by name."""

    results: list[WriteResult] = field(default_factory=list)
    files: dict[str, File] = field(default_factory=dict)
    error: str | None = None


def plan(state: dict[str, Any], path: Path, metadata: dict[str, Any]) -> Plan:
    """Lay the state out over the ranks and their files; no tensor is written. Collective."""
    made = Plan()
    dist_checkpointing.save(
        state,
        str(path),
        FullyParallelSaveStrategyWrapper(made, _replicas()),
        content_metadata=metadata,
        async_sharded_save=True,
        async_strategy="mcore",
    )
    return made


def total_bytes(made: Plan) -> int:
    """Of all ranks' files; collective."""
    total = torch.tensor(made.num_bytes, dtype=torch.int64, device=host.device())
    dist.all_reduce(total)
    return int(total.item())


def stage(made: Plan, *, copies: bool) -> None:
    """Bring what this rank writes into host memory.

    Args:
        copies: of everything, so that the policy may go on; else tensors of the host are shared.
    """

    def staged(tensors: list[tuple[Any, torch.Tensor]]) -> list[tuple[Any, torch.Tensor]]:
        return [(item, tensor.to("cpu", copy=copies)) for item, tensor in tensors]

    try:
        made.writer.write_buckets = [
            (path, name, (objects, staged(tensors)))
            for path, name, (objects, tensors) in made.writer.write_buckets
        ]
    except (RuntimeError, MemoryError) as error:
        made.writer.write_buckets = []
        made.trouble = f"rank {dist.get_rank()} has no room in host memory: {error}"


def write(made: Plan) -> Written:
    """Write this rank's files, and wait until the disk has them; an error is returned.

    In any thread, after `stage`; the tensors are let go.
    """
    written, writer = Written(error=made.trouble), made.writer
    while writer.write_buckets:
        bucket = writer.write_buckets.pop(0)
        path, name, _ = bucket
        # without queues it returns what it did, or the exception that ended it
        _, outcome = writer.write_preloaded_data(
            [writer.transforms], 0, bucket, None, None, use_fsync=True
        )
        if isinstance(outcome, Exception):
            return Written(error=f"{path}: {outcome}")
        written.results += outcome
        try:
            written.files[name] = describe(Path(path))
        except OSError as error:
            return Written(error=f"{path}: {error}")
    return written


def load(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """The state as it was saved, in the place of what it holds. Collective."""
    strategy = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), _replicas())
    return dist_checkpointing.load(state, str(path), strategy)


def _replicas() -> dist.ProcessGroup:
    """The ranks that hold the same weights, between them all of the optimizer's state."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def write_index(made: Plan, path: Path, written: list[Written]) -> None:
    """Write the files by which Megatron finds the ranks' tensors; on rank 0."""
    made.writer.finish(made.index, [one.results for one in written])
    save_config(CheckpointingConfig(made.backend, made.version), str(path))
