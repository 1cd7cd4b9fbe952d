"""The servers of a run, watched: who is lost is started again and given the newest weights.

All of it runs on one event loop. A server is lost when its process ends, when it fails or hangs
up for good, or when it has questions but samples no token for `stall_timeout_s`.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_nft.config import RolloutConfig
from megatron_nft.rollout.client import Client, Generated, Params, ServerError, Unreachable
from megatron_nft.rollout.engine import Digests, differences
from megatron_nft.rollout.servers import ServerProcess
from megatron_nft.rollout.transfer import Cargo

logger = logging.getLogger("megatron_nft")

LOOK_EVERY_S = 0.5
ANSWER_WITHIN_S = 10.0  # what costs a server nothing
RETRY_AFTER_S = (0.2, 1.0, 3.0)  # a question whose server could not be reached
MOST_REST_S = 60.0  # between two attempts to start a server


@dataclass(frozen=True)
class Weights:
    """What every server is to hold: a Hugging Face directory, and what was written there.

    With `cargo` the weights are sent instead, and the directory is what a server starts from.
    """

    path: Path
    version: int = -1
    digests: Digests = field(default_factory=dict)
    cargo: Cargo | None = None


class Member:
    """One server; `process` is None where it was given by address.

    Args:
        command: what starts it, by the directory of its weights.
    """

    def __init__(
        self,
        name: str,
        client: Client,
        process: ServerProcess | None = None,
        command: Callable[[Path], list[str]] | None = None,
    ) -> None:
        self.name, self.client, self.process = name, client, process
        self._command = command
        self.is_live = False
        self.is_paused = False
        self.version = -2  # of the weights it holds; −2: unknown
        self.received: list[Digests] = []  # by each of its workers
        self.trouble = ""  # why it was lost last
        self.num_questions = self.num_answers = 0  # that it has and has not answered
        self.lost_at = time.monotonic()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._lost = asyncio.Event()

    def __str__(self) -> str:
        where = f"log: {self.process.log}" if self.process else self.client.url
        return f"{self.name} ({where})"

    def begin(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Have something done that is cancelled when the server is lost."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def begin_question(self, work: Coroutine[Any, Any, Any], num_answers: int) -> asyncio.Task[Any]:
        """The same, counted in num_questions and num_answers from now on."""
        self._count(1, num_answers)
        task = self.begin(work)
        task.add_done_callback(lambda _: self._count(-1, -num_answers))
        return task

    def _count(self, num_questions: int, num_answers: int) -> None:
        self.num_questions += num_questions
        self.num_answers += num_answers

    def lose(self, trouble: str) -> None:
        """Give it up: whatever it was asked has to be asked of another."""
        if self.is_live:
            self.is_live, self.trouble, self.lost_at = False, trouble, time.monotonic()
            logger.warning("%s is lost: %s", self, trouble)
            for task in self._tasks - {asyncio.current_task()}:
                task.cancel()
            self._lost.set()

    async def ask(self, tokens: Sequence[int], params: Params) -> Generated:
        """A question's answers. Raises ServerError where another server may answer."""
        try:
            return await self._ask(tokens, params)
        except ServerError as error:
            self.lose(str(error))
            raise

    async def _ask(self, tokens: Sequence[int], params: Params) -> Generated:
        for rest_s in RETRY_AFTER_S:
            try:
                return await self.client.generate(tokens, params)
            except Unreachable:
                await asyncio.sleep(rest_s)
        return await self.client.generate(tokens, params)

    async def take(self, weights: Weights, timeout_s: float, *, is_running: bool) -> None:
        """Take weights; with `is_running` questions wait meanwhile, and go on with the new ones."""
        self.version = -2
        if is_running:
            self.is_paused = True
            await self.client.pause(timeout_s)
        if weights.cargo:
            self.received = await self.client.receive_cargo(weights.cargo, timeout_s)
        else:
            self.received = await self.client.receive(weights.path, timeout_s)
        await self.client.forget_prefixes(timeout_s)
        await self.client.name_weights(weights.version, timeout_s)
        await self.client.resume(timeout_s)
        self.version, self.is_paused = weights.version, False

    async def until_lost(
        self, stall_timeout_s: float, on_progress: Callable[[], object] = lambda: None
    ) -> None:
        """Look at it as long as it lives, and tell of the tokens that it makes."""
        count, moved = -1.0, time.monotonic()
        while self.is_live:
            try:
                found = await self.client.num_generated(min(ANSWER_WITHIN_S, stall_timeout_s))
            except ServerError as error:
                found, trouble = None, str(error)
            else:
                trouble = f"{self.num_questions} questions and no token"
            is_waiting = self.num_questions and not self.is_paused
            now = time.monotonic()
            if found not in (None, count):
                on_progress()
            if found is not None and (found != count or not is_waiting):
                count, moved = found, now
            if self.process and self.process.has_ended:
                self.lose("its process ended")
            elif now - moved > stall_timeout_s:
                self.lose(f"{trouble} for {now - moved:.0f} s")
            await self._rest()

    async def _rest(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._lost.wait(), LOOK_EVERY_S)

    def start(self, path: Path) -> None:
        """Start its process with a directory's weights, or leave a server of others as it is."""
        if self.process:
            self.process.kill()
            self.process.start(self._command(path))

    async def until_ready(self, timeout_s: float) -> None:
        """Raises ServerError, with the end of the log, where it is not ready in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return await self.client.check_health(ANSWER_WITHIN_S)
            except ServerError as error:
                trouble = str(error)
            if self.process and self.process.has_ended:
                raise ServerError(f"{self} ended while starting.{self._log_end()}")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self} was not ready within rollout.start_timeout_s={timeout_s:g} s: "
                    f"{trouble}.{self._log_end()}"
                )
            await asyncio.sleep(LOOK_EVERY_S)

    def join(self) -> None:
        """Have questions asked of it from now on."""
        self._lost.clear()
        self.is_live, self.is_paused = True, False

    def _log_end(self) -> str:
        return f" The end of its log:\n{self.process.log_end()}" if self.process else ""


class Fleet:
    """The servers, and the weights that all of them are to hold.

    Args:
        weights: what every server starts with, whenever it starts: they stay where they are.
        tolerance: mean |Δlogp| of the probe between a server that is back and what it gave, or
            another one, by the same weights.
        counts: `engine_restarts`, how often a lost server came back, is kept up in it.
        on_progress: called whenever a server is seen to have made tokens.
    """

    def __init__(
        self,
        members: list[Member],
        weights: Weights,
        options: RolloutConfig,
        tolerance: float,
        counts: Counter[str],
        on_progress: Callable[[], object] = lambda: None,
    ) -> None:
        self.members, self.weights, self._counts = members, weights, counts
        self._on_progress = on_progress
        self._first = weights.path
        self._tolerance = tolerance
        # of the newest weights: texts, and what a server gave to them
        self._probed: tuple[Sequence[np.ndarray], list[np.ndarray]] | None = None
        self._start_timeout_s = options.start_timeout_s
        self._stall_timeout_s = options.stall_timeout_s
        self._in_flight = options.in_flight_updates
        self._watchers: list[asyncio.Task[None]] = []

    @property
    def live(self) -> list[Member]:
        return [m for m in self.members if m.is_live]

    async def start(self) -> None:
        """Start them all, and watch them. Raises ServerError where one does not get ready."""
        for member in self.members:
            member.start(self._first)
        await asyncio.gather(*(m.until_ready(self._start_timeout_s) for m in self.members))
        for member in self.members:
            member.version = self.weights.version
            member.join()
            self._watchers.append(asyncio.create_task(self._watch(member)))

    def check(self) -> None:
        """Raise RuntimeError once no server has lived for as long as a start may take."""
        for watcher in self._watchers:
            if watcher.done():
                watcher.result()
        lost_for_s = time.monotonic() - max(m.lost_at for m in self.members)
        if not self.live and lost_for_s > self._start_timeout_s:
            troubles = "\n".join(f"{m}: {m.trouble}" for m in self.members)
            raise RuntimeError(
                "every engine is lost, and none came back within rollout.start_timeout_s="
                f"{self._start_timeout_s:g} s:\n{troubles}"
            )

    async def hand_over(self, weights: Weights) -> dict[str, Digests]:
        """Give weights to every server that lives, and to the others when they are back.

        Returns what each received; at least one has. Raises RuntimeError: see check.
        """
        self.weights, self._probed = weights, None
        await asyncio.gather(*(self._give(m) for m in self.live))
        while not any(map(self._holds_newest, self.live)):
            self.check()
            await asyncio.sleep(LOOK_EVERY_S)
        self.check()
        return {name: d for m in self.live if self._holds_newest(m) for name, d in _named(m)}

    def _holds_newest(self, member: Member) -> bool:
        return member.version == self.weights.version

    async def _give(self, member: Member) -> None:
        # A batch that is under way may ask at any time: nothing is to be sampled meanwhile.
        is_running = self._in_flight or member.num_questions > 0
        task = member.begin(member.take(self.weights, self._start_timeout_s, is_running=is_running))
        await asyncio.wait([task])
        if not task.cancelled() and isinstance(task.exception(), ServerError):
            member.lose(str(task.exception()))
        elif not task.cancelled():
            task.result()

    async def probe(self, texts: Sequence[np.ndarray]) -> dict[str, list[np.ndarray]]:
        """See Engine.probe; of at least one. Raises RuntimeError: see check."""
        while not (found := await self._probe_live(texts)):
            self.check()
            await asyncio.sleep(LOOK_EVERY_S)
        self._probed = texts, next(iter(found.values()))
        return found

    async def _probe_live(self, texts: Sequence[np.ndarray]) -> dict[str, list[np.ndarray]]:
        found = {}
        # looked up anew each time: one may come back meanwhile
        while waiting := [m for m in self.live if self._holds_newest(m) and m.name not in found]:
            member = waiting[0]
            task = member.begin(self._probe(member, texts))
            await asyncio.wait([task])
            if not task.cancelled() and not isinstance(task.exception(), ServerError):
                found[member.name] = task.result()
            elif not task.cancelled():
                member.lose(str(task.exception()))
        return found

    async def _probe(self, member: Member, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
        asked = (member.client.probe(text, self._stall_timeout_s) for text in texts)
        return await asyncio.gather(*asked)

    async def _watch(self, member: Member) -> None:
        while True:
            await member.until_lost(self._stall_timeout_s, self._on_progress)
            await self._revive(member)

    async def _revive(self, member: Member) -> None:
        """Start it, give it the newest weights, and let it join; until that succeeds."""
        rest_s = 1.0
        while True:
            try:
                await self._restart(member)
                break
            except ServerError as error:
                member.trouble = str(error)
                logger.warning("%s did not come back: %s", member, error)
                await asyncio.sleep(rest_s)
                rest_s = min(2 * rest_s, MOST_REST_S)
        self._counts["engine_restarts"] += 1
        logger.warning("%s is back with the weights of version %d", member, member.version)

    async def _restart(self, member: Member) -> None:
        member.start(self._first)
        await member.until_ready(self._start_timeout_s)
        weights = probed = None
        while weights is not self.weights or probed is not self._probed:  # newer ones may come
            if weights is not self.weights:
                weights, probed = self.weights, None
                await self._give_again(member, weights)
            else:
                probed = self._probed
                await self._compare(member, *probed)
        member.join()

    async def _give_again(self, member: Member, weights: Weights) -> None:
        try:
            if weights.digests:
                await member.take(weights, self._start_timeout_s, is_running=False)
        except ServerError:
            if weights is self.weights:
                raise
            return  # they may be gone already; there are newer ones
        for digests in member.received:
            if trouble := differences(weights.digests, digests):
                raise ServerError(f"it does not hold weights version {weights.version}: {trouble}")

    async def _compare(
        self, member: Member, texts: Sequence[np.ndarray], expected: Sequence[np.ndarray]
    ) -> None:
        """Raise ServerError where it gives texts other log-probabilities than these."""
        found = np.concatenate(await self._probe(member, texts))
        delta = float(np.abs(found - np.concatenate(expected)).mean())
        if not delta <= self._tolerance:
            raise ServerError(
                f"log-probabilities of the probe differ by {delta:.2e} in the mean from what the "
                f"same weights gave before; {self._tolerance:.0e} is allowed"
            )

    async def close(self) -> None:
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        for member in self.members:
            await member.client.close()


def _named(member: Member) -> list[tuple[str, Digests]]:
    """What its workers received: one entry, unless they received different things."""
    first = member.received[0]
    others = [(i, d) for i, d in enumerate(member.received) if i and d != first]
    return [(member.name, first), *((f"{member.name} worker {i}", d) for i, d in others)]
