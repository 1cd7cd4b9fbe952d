"""Where a run's answers come from: its engine, with the policy's newest weights, and its questions.

Engines of the processes themselves sample while the policy waits; servers may sample batches ahead.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_nft import old_logp
from megatron_nft.config import Config
from megatron_nft.evaluate import EvaluationSet, evaluate
from megatron_nft.metrics import PhaseTimer
from megatron_nft.notice import Interrupted, Notice
from megatron_nft.policy import host
from megatron_nft.policy.step import Policy
from megatron_nft.ranks import Ranks, any_of, sharers
from megatron_nft.rollout.ahead import Ahead
from megatron_nft.rollout.collect import Asked, Batch, Collector, ask
from megatron_nft.rollout.colocated import ColocatedEngine
from megatron_nft.rollout.engine import Engine, Sampling
from megatron_nft.rollout.groups import Problem
from megatron_nft.rollout.handover import hand_over
from megatron_nft.rollout.questions import QuestionOrder
from megatron_nft.rollout.remote import RemoteEngine
from megatron_nft.verify.share import check_rate
from megatron_nft.verify.verifier import Verifier
from megatron_nft.watchdog import Watchdog

DRIFT_QUESTIONS, DRIFT_TOKENS = 16, 64  # of which drift is measured where nothing else shows it


class Sampler(ExitStack):
    """Asks a run's questions; leaving it ends the engine. Its methods are collective.

    Args:
        verifier: None on ranks that judge nothing.
    """

    def __init__(
        self,
        config: Config,
        problems: Sequence[Problem],
        policy: Policy,
        verifier: Verifier | None,
        *,
        ranks: Ranks,
        timer: PhaseTimer,
        watchdog: Watchdog,
        notice: Notice,
    ) -> None:
        super().__init__()
        self._config, self._problems, self._policy = config, problems, policy
        self._verifier, self._ranks, self._timer = verifier, ranks, timer
        self._watchdog, self._notice = watchdog, notice
        self._is_abandonable = False  # what the engine is doing
        self._sharers = sharers(config.rollout.tensor)
        self.order = QuestionOrder(problems, config.seed)
        self.collector = Collector(self.order, config.rollout)
        self.ahead = Ahead(self._batch)
        self.callback(self.ahead.close)
        self._engine: Engine | None = None
        self._measured: dict[str, float] = {}  # of the engine, since it was last asked for

    def start(self, tokenizer: Any) -> None:
        """Start the engine, which sleeps until it is given weights."""
        config, is_remote = self._config, self._config.rollout.engine == "remote"
        if is_remote and config.rollout.max_steps_off_policy and not config.rollout.servers:
            # they work all the time
            num_workers = config.rollout.num_servers * config.rollout.tensor
            host.limit_threads(host.num_local_processes() + num_workers)
        kind = partial(RemoteEngine, run_dir=Path(config.run_dir)) if is_remote else ColocatedEngine
        with self._policy.memory_lent():
            self._engine = kind(
                Path(config.model.path),
                tokenizer,
                config.rollout,
                dtype=config.model.dtype,
                max_tokens=config.longest,
                seed=config.seed,
                on_progress=self._progress,
            )
            self.callback(self._engine.close)
            self.callback(self.ahead.cancel)  # before the engine closes: else the next batch begins
            self._ranks.on_main(lambda: None)  # who has no servers to start waits here
            self._engine.sleep()

    # batches

    def collect(self, rollout: int) -> Batch:
        """The groups that a rollout trains on: sampled by the newest weights, judged and counted.

        Raises:
            Interrupted: the scheduler gave notice; what was to be asked is asked again.
            RuntimeError: see Collector.batch and check_rate.
        """
        here = self._collect_here if self._engine.is_collective else self._collect_ahead
        batch = here(rollout)
        rate = batch.tally.metrics().get("unverifiable_rate", 0.0)
        check_rate("rollout", rate, self._config, batch.tally.unverifiable)
        return batch

    def _collect_here(self, rollout: int) -> Batch:
        """The batch of every process's own engine, which sleeps before and after."""
        with self._awake(rollout), self._timer.phase("rollout"), self._abandonable():
            return self._batch(rollout)

    def _collect_ahead(self, rollout: int) -> Batch:
        """The batch that rank 0 gets from the servers; those after it are begun meanwhile.

        Without in-flight updates the servers take new weights between two batches: what a rollout
        trains on was sampled by the weights of `max_steps_off_policy` rollouts before, exactly.
        """
        options = self._config.rollout
        if options.in_flight_updates or not self._ranks.on_main(lambda: rollout in self.ahead):
            self.hand_over_weights(rollout)
        with self._timer.phase("rollout"):
            batch = self._ranks.on_main(lambda: self.ahead.take(rollout, self._is_noticed_here))
        if batch is None:
            raise Interrupted
        last = min(rollout + options.max_steps_off_policy, self._config.rollouts - 1)
        if rollout < last:
            self.hand_over_weights(rollout)
        for later in range(rollout + 1, last + 1):
            if self._ranks.is_main:
                self.ahead.start(later)
        return batch

    def _batch(self, rollout: int) -> Batch:
        oldest = rollout - self._config.rollout.max_steps_off_policy
        return self.collector.batch(partial(self._ask, rollout), oldest)

    def _ask(
        self, rollout: int, problems: Sequence[Problem], expected: Sequence[float], attempt: int
    ) -> Asked:
        options = self._config.rollout
        sampling = Sampling(
            answers=options.answers,
            temperature=options.temperature,
            top_p=options.top_p,
            max_tokens=options.max_response_tokens,
            seed=_mix(self._config.seed, rollout, attempt),
            finish_fraction=options.finish_fraction,
        )
        return ask(self._engine, self._verifier, problems, expected, sampling)

    def settle(self) -> dict[int, Batch]:
        """Wait until nothing is sampled ahead; on rank 0, what is there and not yet trained on.

        At the scheduler's notice, what is being sampled is given up.
        """
        if not self._ranks.on_main(lambda: self.ahead.is_settled(self._is_noticed_here)):
            self.abandon()
        return self.ahead.settle()

    # weights

    @contextmanager
    def _awake(self, version: int) -> Iterator[None]:
        """The engine with the newest weights, on memory that the policy lends it."""
        with ExitStack() as stack:
            with self._timer.phase("memory"):
                stack.enter_context(self._policy.memory_lent())
            self.hand_over_weights(version)
            try:
                yield
            except Interrupted:  # a checkpoint needs the memory too
                self._engine.sleep()
                raise
            with self._timer.phase("memory"):
                self._measured |= self._engine.sleep()
                stack.close()

    def hand_over_weights(self, version: int) -> None:
        """Give the engine the policy's weights, unless it has them, and have it prove that it has.

        Args:
            version: of the weights, the number of rollouts that they have been trained on.
        """
        if self._engine.version == version:
            return
        with self._timer.phase("weights"):
            self._measured |= hand_over(self._policy, self._engine, version)
            if not self._engine.is_collective and self._config.rollout.max_steps_off_policy:
                self._measured |= self._measure_drift(version)

    def _measure_drift(self, version: int) -> dict[str, float]:
        """How far the newest weights' answers are from the policy, where none of them trains.

        A few short answers, sampled as those of a batch are.
        """
        options = self._config.rollout
        problems = self._problems[:DRIFT_QUESTIONS]
        sampling = Sampling(
            answers=1,
            temperature=options.temperature,
            top_p=options.top_p,
            max_tokens=min(DRIFT_TOKENS, options.max_response_tokens),
            seed=_mix(self._config.seed, version),
        )
        expected = [1.0] * len(problems)
        asked = partial(self._engine.generate, problems, expected, sampling)
        answers = [(problems[i].prompt_tokens, r) for i, (r,) in self._ranks.on_main(asked)]
        found = old_logp.of_answers(self._policy, answers)
        old_logp.act_on(found, self._config.drift)
        return found

    # evaluation

    def evaluate(self, sets: Sequence[EvaluationSet], version: int) -> dict[str, float]:
        """Accuracy on held-out sets, by the newest weights."""
        self.settle()
        evaluated = partial(evaluate, self._engine, self._verifier, sets, self._config)
        with self._awake(version), self._timer.phase("evaluate"):
            return evaluated() if self._engine.is_collective else self._ranks.on_main(evaluated)

    def metrics(self) -> dict[str, float]:
        """What the engine said of itself since the last call; servers' troubles in all."""
        found, self._measured = self._measured, {}
        return found | (dict(self._engine.counts) if self._engine else {})

    # the scheduler's notice

    def abandon(self) -> None:
        """Give up what servers are sampling ahead; what was sampled stays."""
        if self._ranks.is_main and isinstance(self._engine, RemoteEngine):
            self.ahead.abandon(self._engine.abandon)
            self._engine.listen()  # an evaluation is finished first

    def _is_noticed_here(self) -> bool:
        return self._notice.has_come

    @contextmanager
    def _abandonable(self) -> Iterator[None]:
        self._is_abandonable = True
        try:
            yield
        finally:
            self._is_abandonable = False

    def _progress(self) -> None:
        """After a step of an engine; all its ranks abandon it at the same one."""
        self._watchdog.beat()
        if not self._is_abandonable:
            return
        noticed = self._notice.has_come
        if any_of(self._sharers, noticed) if self._sharers else noticed:
            raise Interrupted


def _mix(*numbers: int) -> int:
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
