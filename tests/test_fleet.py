"""A server that comes back while weights change under it. Real ones: test_remote.py."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_nft.config import RolloutConfig
from megatron_nft.rollout.asking import Asking, Question
from megatron_nft.rollout.client import (
    Answer,
    Client,
    Generated,
    Logprobs,
    Probability,
    ServerError,
    Span,
    Unreachable,
)
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

    def __init__(self, during_take: Sequence[Step] = (), during_probe: Sequence[Step] = ()) -> None:
        super().__init__()
        self.version, self.fleet, self.log = 0, None, []
        self._during_take, self._during_probe = [*during_take], [*during_probe]

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


def _fails(then: Step) -> Step:
    """As where a directory of weights is removed."""

    def step(fleet: Fleet) -> None:
        then(fleet)
        raise ServerError("no such directory")

    return step


def _probes(version: int) -> Step:
    def step(fleet: Fleet) -> None:
        fleet._probed = TEXTS, [_logp(version)]

    return step


def _restart(
    during_take: Sequence[Step] = (), during_probe: Sequence[Step] = (), probed: int | None = 1
) -> tuple[Member, list[str]]:
    async def run() -> tuple[Member, list[str]]:
        client = Scripted(during_take, during_probe)
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
        ([_fails(_hands_over(2, probes=True))], [], ["took 1", "took 2", "probed 2"]),
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


def test_a_server_that_takes_no_weights_does_not_join() -> None:
    with pytest.raises(ServerError, match="no such directory"):
        _restart([_fails(lambda fleet: None)])


def test_weights_that_arrive_otherwise_are_named() -> None:
    with pytest.raises(ServerError, match=r"hold weights version 1: other values: w \(1 was sent"):
        _restart([lambda fleet: setattr(fleet.members[0].client, "version", 7)])


def test_a_server_starts_from_what_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories of earlier versions are removed meanwhile."""
    started: list[Path] = []
    monkeypatch.setattr(Member, "start", lambda self, path: started.append(path))

    async def run() -> None:
        member = Member("server 0", Scripted())
        fleet = Fleet([member], Weights(Path("model")), RolloutConfig(), 1e-3, Counter())
        fleet.weights = _weights(5)
        await fleet._restart(member)
        await member.client.close()

    asyncio.run(run())
    assert started == [Path("model")]


def test_a_probe_that_is_under_way_looks_at_who_joins_meanwhile() -> None:
    async def run() -> dict[str, list[np.ndarray]]:
        late = Scripted()
        members = [Member("server 0", Scripted(during_probe=[lambda _: members[1].join()]))]
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


# questions


class Flaky(Scripted):
    """Answers all questions, or loses them all."""

    def __init__(self, *, is_good: bool) -> None:
        super().__init__()
        self.is_good = is_good

    async def generate(self, *_: object) -> Generated:
        await asyncio.sleep(0)
        if not self.is_good:
            raise ServerError("hung up")
        answer = Answer(0, "stop", [1], Logprobs([Probability(-1.0)]), [Span("1")])
        return Generated([answer])


def _ask(*are_good: bool, num_gone: int = 0) -> tuple[dict[int, list[Answer]], Counter[str]]:
    """Twenty questions, of servers that are back at once, and of some that never live."""

    async def run() -> tuple[dict[int, list[Answer]], Counter[str]]:
        members = [Member(f"server {i}", Flaky(is_good=good)) for i, good in enumerate(are_good)]
        counts = Counter()
        gone = [Member("gone", Flaky(is_good=True)) for _ in range(num_gone)]
        fleet = Fleet(members + gone, _weights(1), RolloutConfig(), 1e-3, counts)
        for member in members:
            member.version = 1
            member.join()
            member.lose = lambda trouble: None  # and back
        questions = {i: Question([1], {"n": 1}) for i in range(20)}
        try:
            asking = Asking(fleet, questions, 20, 2, counts, lambda *_: None, threading.Event())
            return await asking.run(), counts
        finally:
            await fleet.close()

    return asyncio.run(run())


def test_a_server_that_loses_everything_costs_no_question_while_another_lives() -> None:
    answers, counts = _ask(False, True, False)
    assert sorted(answers) == list(range(20))
    assert 0 < counts["questions_asked_again"] <= 2 * 20  # not asked twice of one that lost it


@pytest.mark.parametrize("num_gone", [0, 1])
def test_questions_that_every_server_loses_again_and_again_are_an_error(num_gone: int) -> None:
    with pytest.raises(RuntimeError, match=r"asked \d+ times in vain, last: hung up"):
        _ask(False, False, num_gone=num_gone)


@pytest.mark.parametrize(("num_failures", "is_answered"), [(3, True), (4, False)])
def test_a_server_that_cannot_be_reached_for_a_moment_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, num_failures: int, is_answered: bool
) -> None:
    monkeypatch.setattr("megatron_nft.rollout.fleet.RETRY_AFTER_S", (0, 0, 0))
    failures = [Unreachable("hung up")] * num_failures

    class Hiding(Flaky):
        async def generate(self, *args: object) -> Generated:
            if failures:
                raise failures.pop()
            return await super().generate(*args)

    async def run() -> Member:
        member = Member("server 0", Hiding(is_good=True))
        member.join()
        try:
            await member.ask([1], {})
        except Unreachable:
            assert not is_answered
        await member.client.close()
        return member

    assert asyncio.run(run()).is_live == is_answered


@pytest.mark.parametrize("num_answers", [0, 3])
def test_a_server_that_says_nothing_any_more_is_lost(
    monkeypatch: pytest.MonkeyPatch, num_answers: int
) -> None:
    """Which is when it does not even tell how many tokens it has sampled."""
    monkeypatch.setattr("megatron_nft.rollout.fleet.LOOK_EVERY_S", 0.01)
    answers = [*range(num_answers)]

    class Silent(Scripted):
        async def num_generated(self, timeout_s: float) -> float:
            if answers:
                return answers.pop(0)
            raise Unreachable("/metrics did not answer within 0.3 s")

    async def run() -> Member:
        member = Member("server 0", Silent())
        member.join()
        await asyncio.wait_for(member.until_lost(0.3), 10)
        await member.client.close()
        return member

    member = asyncio.run(run())
    assert not member.is_live
    assert member.trouble.startswith("/metrics did not answer")
