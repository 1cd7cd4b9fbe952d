"""One batch of questions, asked of whichever servers live until enough are answered."""

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_nft.notice import Interrupted
from megatron_nft.rollout.client import Answer, Params, ServerError
from megatron_nft.rollout.fleet import Fleet, Member

LOOK_EVERY_S = 0.5  # for servers that came back
MAX_TIMES_LOST = 5  # a question whose servers are lost again and again may be what ends them


@dataclass(frozen=True)
class Question:
    """A prompt, and vLLM's SamplingParams for its answers."""

    tokens: list[int]
    params: Params

    @property
    def num_answers(self) -> int:
        return self.params["n"]


def number_of(version: str) -> int:
    """−1 for what vLLM calls weights that nobody has named."""
    return -1 if version == "default" else int(version)


class Asking:
    """Questions by their numbers, in the order in which they are to be asked.

    Whose server is lost is asked again before the others, if possible of a server that has not
    lost it yet. The same seed goes with it: the same weights give the same answers.

    Args:
        enough: how many of the questions are to be answered; the others are cut off then.
        num_at_once: answers a server; it gets a question while it has fewer.
        counts: `questions_asked_again` is kept up in it.
        tell: called with a question's number and answers once they are there, once each, in a
            thread of its own.
        abandoned: once it is set, nothing more is asked.
    """

    def __init__(
        self,
        fleet: Fleet,
        questions: Mapping[int, Question],
        enough: int,
        num_at_once: int,
        counts: Counter[str],
        tell: Callable[[int, list[Answer]], None],
        abandoned: threading.Event,
    ) -> None:
        self._fleet, self._questions, self._counts = fleet, questions, counts
        self._tell, self._abandoned = tell, abandoned
        self._enough, self._num_at_once = enough, num_at_once
        self._waiting = deque(questions)
        self._running: dict[asyncio.Task[list[Answer]], tuple[int, Member]] = {}
        self._lost_by: dict[int, list[Member]] = {number: [] for number in questions}
        self._answered: dict[int, list[Answer]] = {}

    async def run(self) -> dict[int, list[Answer]]:
        """The answers by question. Raises as RemoteEngine.generate does."""
        try:
            while len(self._answered) < self._enough:
                if self._abandoned.is_set():
                    raise Interrupted
                self._fleet.check()
                self._hand_out()
                await self._hear()
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
        return self._answered

    def _hand_out(self) -> None:
        while pair := self._next():
            number, member = pair
            self._waiting.remove(number)
            asked = self._ask(member, number)
            task = member.begin_question(asked, self._questions[number].num_answers)
            self._running[task] = pair

    def _next(self) -> tuple[int, Member] | None:
        """The first question that waits and that a free server may have, and that server."""
        free = [m for m in self._fleet.live if m.num_answers < self._num_at_once]
        for number in self._waiting if free else ():
            others = self._others(number)
            allowed = [m for m in free if not others or m in others]
            if allowed:
                return number, min(allowed, key=lambda m: m.num_answers)
        return None

    def _others(self, number: int) -> list[Member]:
        """Servers that live and have not lost a question."""
        return [m for m in self._fleet.live if m not in self._lost_by[number]]

    async def _ask(self, member: Member, number: int) -> list[Answer]:
        question, oldest = self._questions[number], member.version
        choices = (await member.ask(question.tokens, question.params)).choices
        versions = {
            number_of(span.version) for choice in choices for span in choice.weight_versions
        }
        if min(versions) < oldest or max(versions) > self._fleet.weights.version:
            member.lose(f"it answered by weights of versions {sorted(versions)}, not {oldest}")
            raise ServerError(member.trouble)
        for choice in choices:
            if choice.finish_reason == "abort":
                raise ServerError("it was told to abort")
            if choice.finish_reason not in ("stop", "length"):  # would pass for a wrong answer
                raise RuntimeError(f"{member} ended an answer with {choice.finish_reason!r}")
        return sorted(choices, key=lambda choice: choice.index)

    async def _hear(self) -> None:
        if not self._running:
            await asyncio.sleep(LOOK_EVERY_S)
            return
        done, _ = await asyncio.wait(
            self._running, timeout=LOOK_EVERY_S, return_when=asyncio.FIRST_COMPLETED
        )
        for task in done:
            number, member = self._running.pop(task)
            if task.cancelled() or isinstance(task.exception(), ServerError):
                self._lost_by[number].append(member)
                self._ask_again(number, task)
            else:
                answers = self._answered[number] = task.result()
                await asyncio.to_thread(self._tell, number, answers)

    def _ask_again(self, number: int, task: asyncio.Task[list[Answer]]) -> None:
        lost_by = self._lost_by[number]
        if len(lost_by) >= MAX_TIMES_LOST and not self._others(number):
            troubles = "\n".join(f"{m}: {m.trouble}" for m in self._fleet.members)
            last = "its server was lost" if task.cancelled() else str(task.exception())
            raise RuntimeError(
                f"a question was asked {len(lost_by)} times in vain, last: {last}\n{troubles}"
            )
        self._counts["questions_asked_again"] += 1
        self._waiting.appendleft(number)
