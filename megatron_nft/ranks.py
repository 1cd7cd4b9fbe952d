"""What the ranks of a run tell each other, however long one of them takes."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = timedelta(days=7)  # with what others wait: sampling may well outlast a collective


class Ranks:
    """All training processes; every method is collective."""

    def __init__(self) -> None:
        self.is_main = dist.get_rank() == 0
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def on_main(self, function: Callable[[], Any]) -> Any:
        """What rank 0 gets from a function, on every rank; errors there are raised on all."""
        outcome: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_main:
            try:
                outcome[0] = function()
            except (RuntimeError, ValueError, OSError) as error:
                failure, outcome[1] = error, str(error)
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if failure:
            raise failure
        if outcome[1] is not None:
            raise RuntimeError(outcome[1])
        return outcome[0]

    def any(self, value: bool) -> bool:
        """Whether it is true on any of them."""
        return any_of(self._group, value)


def any_of(group: dist.ProcessGroup, value: bool) -> bool:
    """Whether it is true on any rank of a gloo group."""
    found = torch.tensor(int(value))
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return bool(found)


def sharers(num_ranks: int) -> dist.ProcessGroup | None:
    """This rank and those that share an engine with it; None where none does. Collective."""
    if num_ranks == 1:
        return None
    firsts = range(0, dist.get_world_size(), num_ranks)
    groups = [dist.new_group(range(i, i + num_ranks), backend="gloo") for i in firsts]
    return groups[dist.get_rank() // num_ranks]
