"""A server that comes back while weights change under it. Real ones: test_remote.py."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_nft.config import RolloutConfig
from megatron_nft.rollout.client import Client, ServerError
from megatron_nft.rollout.engine import Digests
from megatron_nft.rollout.fleet import Fleet, Member, Weights

TEXTS = [np.arange(3, dtype=np.int32)]
Step = Callable[[Fleet], None]


def _weights(version: int) -> Weights:
    return Weights(Path(str(version)), version, {"w": str(version)})


def _logp(version: int) -> np.ndarray:
    return np.full(2, -float(version), np.float32)


class Scripted(Client):
    """A server in so far as it takes weights and computes by them; meanwhile things happen."""

    def __init__(self, during_take: list[Step], during_probe: list[Step]) -> None:
        super().__init__()
        self.version, self.fleet, self.log = 0, None, []
        self._during_take, self._during_probe = during_take, during_probe

    async def _request(self, method: str, path: str, *_: object, **__: object) -> bytes:
        return b'{"success": true}'

    async def receive(self, path: Path, timeout_s: float) -> list[Digests]:
        self.version = int(str(path))
        self.log.append(f"took {self.version}")
        if self._during_take:
            self._during_take.pop(0)(self.fleet)
        return [{"w": str(self.version)}]

    async def probe(self, text: np.ndarray, timeout_s: float) -> np.ndarray:
        self.log.append(f"probed {self.version}")
        found = _logp(self.version)
        if self._during_probe:
            self._during_probe.pop(0)(self.fleet)
        return found


def _hands_over(version: int, *, probes: bool) -> Step:
    """As the fleet does it for the servers that live."""

    def step(fleet: Fleet) -> None:
        fleet.weights, fleet._probed = _weights(version), None
        if probes:
            _probes(version)(fleet)

    return step


def _probes(version: int) -> Step:
    def step(fleet: Fleet) -> None:
        fleet._probed = TEXTS, [_logp(version)]

    return step


def _restart(
    during_take: Sequence[Step] = (), during_probe: Sequence[Step] = (), probed: int | None = 1
) -> tuple[Member, list[str]]:
    async def run() -> tuple[Member, list[str]]:
        client = Scripted([*during_take], [*during_probe])
        member = Member("server 0", client)
        fleet = Fleet([member], _weights(1), RolloutConfig(), 1e-3, Counter())
        client.fleet = fleet
        if probed is not None:
            _probes(probed)(fleet)
        try:
            await fleet._restart(member)
        finally:
            await client.close()
        return member, client.log

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("during_take", "during_probe", "log"),
    [
        ([], [], ["took 1", "probed 1"]),
        ([_hands_over(2, probes=True)], [], ["took 1", "took 2", "probed 2"]),
        ([_hands_over(2, probes=False)], [], ["took 1", "took 2"]),
        ([], [_hands_over(2, probes=True)], ["took 1", "probed 1", "took 2", "probed 2"]),
        ([], [_hands_over(2, probes=False)], ["took 1", "probed 1", "took 2"]),
        (
            [_hands_over(2, probes=False), _probes(2)],
            [],
            ["took 1", "took 2", "probed 2"],
        ),
    ],
)
def test_a_server_joins_with_the_newest_weights_and_their_probe(
    during_take: list[Step], during_probe: list[Step], log: list[str]
) -> None:
    member, found = _restart(during_take, during_probe)
    assert found == log
    assert member.is_live
    assert member.version == int(log[-1].split()[1])


def test_a_server_that_computes_otherwise_does_not_join() -> None:
    with pytest.raises(ServerError, match=r"probe differ by 1\.00e\+00"):
        _restart(probed=2)


def test_a_probe_that_is_under_way_looks_at_who_joins_meanwhile() -> None:
    async def run() -> dict[str, list[np.ndarray]]:
        late = Scripted([], [])
        members = [Member("server 0", Scripted([], [lambda _: members[1].join()]))]
        members.append(Member("server 1", late))
        fleet = Fleet(members, _weights(1), RolloutConfig(), 1e-3, Counter())
        members[0].client.version = late.version = 1
        for member in members:
            member.version = 1
        members[0].join()
        try:
            return await fleet.probe(TEXTS)
        finally:
            for member in members:
                await member.client.close()

    assert list(asyncio.run(run())) == ["server 0", "server 1"]
