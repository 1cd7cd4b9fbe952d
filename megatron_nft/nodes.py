"""A run on several machines: one launcher a node, which meet before any training process starts.

Node 0 keeps the roll. A node that does not come is named within the deadline, where a rendezvous
would wait in silence.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

MEETING_PORT = 29400  # node 0 needs this one and the next


@dataclass(frozen=True)
class Nodes:
    """Where this node stands among those of a run."""

    num: int = 1
    rank: int = 0
    meeting: str = ""  # HOST or HOST:PORT of node 0
    names: tuple[str, ...] = ()  # of all nodes by their rank, for messages
    deadline_s: float = 600.0

    @property
    def host(self) -> str:
        return self.meeting.rpartition(":")[0] if ":" in self.meeting else self.meeting

    @property
    def port(self) -> int:
        """Of the roll call; torchrun's is the next."""
        return int(self.meeting.rpartition(":")[2]) if ":" in self.meeting else MEETING_PORT

    def name_of(self, rank: int) -> str:
        return f"node {rank}" + (f" ({self.names[rank]})" if self.names else "")


ALONE = Nodes()


def check(nodes: Nodes) -> None:
    """Raise ValueError where the numbers do not fit together."""
    if not 0 <= nodes.rank < nodes.num:
        raise ValueError(f"--node-rank was {nodes.rank}; it may be 0 to {nodes.num - 1}")
    if nodes.num > 1 and not nodes.host:
        raise ValueError("--meeting is missing: with several nodes, HOST or HOST:PORT of node 0")
    if ":" in nodes.meeting and not nodes.meeting.rpartition(":")[2].isdigit():
        raise ValueError(f"--meeting was {nodes.meeting!r}; it may be HOST or HOST:PORT")
    if nodes.names and len(nodes.names) != nodes.num:
        raise ValueError(f"--node-names has {len(nodes.names)} names for {nodes.num} nodes")


def roll_call(nodes: Nodes, trouble: str = "") -> None:
    """Wait until every node has come; all of them hear of one that cannot go on.

    Args:
        trouble: why this node cannot; the others are told.

    Raises:
        ValueError: a node did not come within the deadline, or has trouble; it is named.
    """
    from torch.distributed import DistNetworkError, DistStoreError, TCPStore

    patience = timedelta(seconds=nodes.deadline_s)
    try:
        store = TCPStore(
            nodes.host, nodes.port, nodes.num, nodes.rank == 0, patience, wait_for_workers=False
        )
    except (DistNetworkError, DistStoreError) as error:
        where = f"{nodes.name_of(0)} at {nodes.host}:{nodes.port}"
        raise ValueError(
            f"{where} could not be met within {nodes.deadline_s:g} s: {error}"
        ) from error
    store.set(f"node {nodes.rank}", trouble or f"ready on {socket.gethostname()}")
    absent = _absent(nodes, store)
    troubles = [] if absent else _troubles(nodes, store)
    _leave(nodes, store, absent)
    if absent:
        raise ValueError(
            f"{', '.join(map(nodes.name_of, absent))} of {nodes.num} did not come within "
            f"{nodes.deadline_s:g} s; look at its log, or leave it out and start again"
        )
    if troubles:
        raise ValueError("; ".join(troubles))


def _absent(nodes: Nodes, store: TCPStore) -> list[int]:
    """Ranks of the nodes that did not come in time."""
    from torch.distributed import DistStoreError

    keys = [f"node {rank}" for rank in range(nodes.num)]
    try:
        store.wait(keys, timedelta(seconds=nodes.deadline_s))
    except DistStoreError:
        return [rank for rank, key in enumerate(keys) if not store.check([key])]
    return []


def _troubles(nodes: Nodes, store: TCPStore) -> list[str]:
    said = [store.get(f"node {rank}").decode() for rank in range(nodes.num)]
    return [
        f"{nodes.name_of(rank)}: {what}"
        for rank, what in enumerate(said)
        if not what.startswith("ready on ")
    ]


def _leave(nodes: Nodes, store: TCPStore, absent: Sequence[int]) -> None:
    """Node 0 keeps the store until all the others have read it."""
    from torch.distributed import DistStoreError

    here = [rank for rank in range(1, nodes.num) if rank not in absent]
    if nodes.rank:
        store.set(f"left {nodes.rank}", "")
        return
    try:
        store.wait([f"left {rank}" for rank in here], timedelta(seconds=nodes.deadline_s))
    except DistStoreError:
        return  # whoever is gone meanwhile is missed by torchrun
