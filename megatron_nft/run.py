"""What a training run holds in each process: data, policy, engine, verifier, directory."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoTokenizer

from checkpoints_conversion import hf_to_megatron, megatron_to_hf
from checkpoints_conversion.hf_files import read_hf_config
from megatron_nft import old_logp, recipe
from megatron_nft.config import Config
from megatron_nft.evaluate import evaluate
from megatron_nft.export_check import check_export
from megatron_nft.metrics import MetricsLog, PhaseTimer
from megatron_nft.notice import REQUEUE, Interrupted, Notice
from megatron_nft.policy import checkpoint, host
from megatron_nft.policy.checkpoint import RunState
from megatron_nft.policy.step import Policy
from megatron_nft.ranks import Ranks, any_of, sharers
from megatron_nft.rollout import saving
from megatron_nft.rollout.ahead import Ahead
from megatron_nft.rollout.collect import Asked, Batch, Collector, ask
from megatron_nft.rollout.colocated import ColocatedEngine
from megatron_nft.rollout.engine import Engine, Sampling
from megatron_nft.rollout.groups import Problem, solved
from megatron_nft.rollout.handover import hand_over
from megatron_nft.rollout.questions import QuestionOrder
from megatron_nft.rollout.records import write_groups
from megatron_nft.rollout.remote import RemoteEngine
from megatron_nft.sources import Sources
from megatron_nft.statistics import mean_accuracy
from megatron_nft.updates import Updates
from megatron_nft.verify.share import check_rate, start_verifier
from megatron_nft.watchdog import Watchdog

DRIFT_QUESTIONS, DRIFT_TOKENS = 16, 64  # of which drift is measured where nothing else shows it

logger = logging.getLogger("megatron_nft")


class Run(ExitStack):
    """A run from where it stands in its directory; leaving it ends what it started."""

    def __init__(self, config: Config, notice: Notice) -> None:
        super().__init__()
        self.config, self._notice = config, notice
        self._is_abandonable = False  # what the engine is doing
        self.directory = Path(config.run_dir)
        logs, timeout_s = self.directory / "logs", config.watchdog.timeout_s
        self.watchdog = self.enter_context(Watchdog(logs, timeout_s, dist.get_rank()))
        self.timer = PhaseTimer(self.watchdog.enter)
        self.ranks, self._sharers = Ranks(), sharers(config.rollout.tensor)
        path = Path(config.model.path)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.verifier = start_verifier(config, self.watchdog.beat)
        if self.verifier:
            self.enter_context(self.verifier)
        sources = Sources(config, self.tokenizer, self.verifier, self.ranks.on_main)
        self.problems = sources.training()
        self.order = QuestionOrder(self.problems, config.seed)
        self.collector = Collector(self.order, config.rollout)
        self.eval_sets = sources.evaluation()
        hf_config = read_hf_config(path)
        fill = partial(hf_to_megatron.load, path=path, hf_config=hf_config)
        self.watchdog.enter("model")
        self.policy = Policy(config, hf_config, fill, self.watchdog.beat)
        checkpoint.check(self.policy)
        skipped = self.directory / "skipped" if self.ranks.is_main else None
        self.updates = Updates(self.policy, skipped, config.optimizer.max_skipped_steps)
        self.ahead = Ahead(self._batch)
        self.callback(self.ahead.close)
        self.watchdog.enter("resume")
        self.state = self._resume()
        self._saved_rollout = self.state.rollout
        self.watchdog.enter("engine")
        with self.policy.memory_lent():
            self.engine = self._start_engine() if self.samples or self.eval_sets else None
        self.sampled: dict[str, float] = {}  # metrics of the engine since they were last logged
        self.checkpoints_failed = 0  # since this process started
        self._start_log()

    @property
    def samples(self) -> bool:
        """False where the data's solutions stand in for sampled answers."""
        return self.config.objective.name != "sft"

    def evaluates_after(self, state: RunState) -> bool:
        return bool(self.eval_sets) and self._is_due(self.config.evaluate.every, state)

    def saves_after(self, state: RunState) -> bool:
        return self.is_finished or self._is_due(self.config.checkpoint.every, state)

    def _is_due(self, every: int, state: RunState) -> bool:
        """True every `every` rollouts and after the last one; never where it is 0."""
        return every > 0 and (state.rollout % every == 0 or state.rollout == self.config.rollouts)

    # data

    def collect(self) -> Batch:
        """The groups of one rollout: sampled, judged and counted, or the data's solutions."""
        if not self.samples:
            groups = [solved(p) for p in self.order.take(self.config.rollout.questions)]
            return Batch(groups, None)
        batch = self._collect_here() if self.engine.is_collective else self._collect_ahead()
        rate = batch.tally.metrics().get("unverifiable_rate", 0.0)
        check_rate("rollout", rate, self.config, batch.tally.unverifiable)
        return batch

    def _collect_here(self) -> Batch:
        """The batch of every process's own engine, which sleeps before and after.

        Raises:
            Interrupted: the scheduler gave notice; what was to be asked is asked again.
        """
        collector, position = self.collector, self.order.position
        surplus, cut = collector.surplus, collector.cut
        try:
            with self._sampling(), self.timer.phase("rollout"), self._abandonable():
                return self._batch(self.state.rollout)
        except Interrupted:
            self.order.position, collector.surplus, collector.cut = position, surplus, cut
            raise

    def _collect_ahead(self) -> Batch:
        """The batch that rank 0 gets from the servers; those after it are begun meanwhile.

        Without in-flight updates the servers take new weights between two batches: what a rollout
        trains on was sampled by the weights of `max_steps_off_policy` rollouts before, exactly.
        """
        rollout, options = self.state.rollout, self.config.rollout
        if options.in_flight_updates or not self.ranks.on_main(lambda: rollout in self.ahead):
            self.hand_over_weights()
        with self.timer.phase("rollout"):
            batch = self.ranks.on_main(lambda: self.ahead.take(rollout))
        last = min(rollout + options.max_steps_off_policy, self.config.rollouts - 1)
        if rollout < last:
            self.hand_over_weights()
        for later in range(rollout + 1, last + 1):
            if self.ranks.is_main:
                self.ahead.start(later)
        return batch

    def _batch(self, rollout: int) -> Batch:
        oldest = rollout - self.config.rollout.max_steps_off_policy
        return self.collector.batch(partial(self._ask, rollout), oldest)

    def _ask(
        self, rollout: int, problems: Sequence[Problem], expected: Sequence[float], attempt: int
    ) -> Asked:
        options = self.config.rollout
        sampling = Sampling(
            answers=options.answers,
            temperature=options.temperature,
            top_p=options.top_p,
            max_tokens=options.max_response_tokens,
            seed=_mix(self.config.seed, rollout, attempt),
            finish_fraction=options.finish_fraction,
        )
        return ask(self.engine, self.verifier, problems, expected, sampling)

    # engine

    def _start_engine(self) -> Engine:
        config, is_remote = self.config, self.config.rollout.engine == "remote"
        if is_remote and config.rollout.max_steps_off_policy and not config.rollout.servers:
            # they work all the time
            num_workers = config.rollout.num_servers * config.rollout.tensor
            host.limit_threads(host.num_local_processes() + num_workers)
        kind = partial(RemoteEngine, run_dir=self.directory) if is_remote else ColocatedEngine
        engine = kind(
            Path(config.model.path),
            self.tokenizer,
            config.rollout,
            dtype=config.model.dtype,
            max_tokens=config.longest,
            seed=config.seed,
            on_progress=self._progress,
        )
        self.callback(engine.close)
        self.callback(self.ahead.cancel)  # before the engine closes: else the next batch begins
        self.ranks.on_main(lambda: None)  # who has no servers to start waits here
        engine.sleep()  # until it is given weights
        return engine

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """The engine with the newest weights, on memory that the policy lends it."""
        with self.policy.memory_lent():
            self.hand_over_weights()
            try:
                yield
            except Interrupted:  # a checkpoint needs the memory too
                self.engine.sleep()
                raise
            self.sampled |= self.engine.sleep()

    def hand_over_weights(self) -> None:
        """Give the engine the policy's weights, unless it has them, and have it prove that it has.

        Collective.
        """
        if self.engine.version == self.state.rollout:
            return
        with self.timer.phase("weights"):
            self.sampled |= hand_over(self.policy, self.engine, self.state.rollout)
            if not self.engine.is_collective and self.config.rollout.max_steps_off_policy:
                self.sampled |= self._measure_drift()

    def _measure_drift(self) -> dict[str, float]:
        """How far the newest weights' answers are from the policy, where none of them trains.

        A few short answers, sampled as those of a batch are; collective.
        """
        options = self.config.rollout
        problems = self.problems[:DRIFT_QUESTIONS]
        sampling = Sampling(
            answers=1,
            temperature=options.temperature,
            top_p=options.top_p,
            max_tokens=min(DRIFT_TOKENS, options.max_response_tokens),
            seed=_mix(self.config.seed, self.state.rollout),
        )
        expected = [1.0] * len(problems)
        asked = partial(self.engine.generate, problems, expected, sampling)
        answers = [(problems[i].prompt_tokens, r) for i, (r,) in self.ranks.on_main(asked)]
        found = old_logp.of_answers(self.policy, answers)
        old_logp.act_on(found, self.config.drift)
        return found

    def _settle(self) -> None:
        """Wait until nothing is sampled ahead; collective."""
        self.ranks.on_main(lambda: len(self.ahead.settle()))

    def evaluate(self) -> dict[str, float]:
        """Accuracy on the held-out sets, by the newest weights; collective."""
        self._settle()
        evaluated = partial(evaluate, self.engine, self.verifier, self.eval_sets, self.config)
        with self._sampling(), self.timer.phase("evaluate"):
            metrics = evaluated() if self.engine.is_collective else self.ranks.on_main(evaluated)
        for key, value in metrics.items():
            if key.endswith("/unverifiable_rate"):
                check_rate(key, value, self.config)
        return metrics

    # the scheduler's notice

    def is_noticed(self) -> bool:
        """Whether any rank was told that the time is up; collective."""
        return self.ranks.any(self._notice.has_come)

    def save_for_later(self) -> None:
        """Leave a checkpoint of where the run stands, unless there is one; collective."""
        if self.state.rollout not in (0, self._saved_rollout):
            self.save({})
        if self.ranks.is_main:
            logger.warning(
                "told to stop after %d rollouts; start it again by the same command (exit code %d)",
                self._saved_rollout,
                REQUEUE,
            )

    @contextmanager
    def _abandonable(self) -> Iterator[None]:
        self._is_abandonable = True
        try:
            yield
        finally:
            self._is_abandonable = False

    def _progress(self) -> None:
        """After a step of an engine; all its ranks abandon it at the same one."""
        self.watchdog.beat()
        if not self._is_abandonable:
            return
        noticed = self._notice.has_come
        if any_of(self._sharers, noticed) if self._sharers else noticed:
            raise Interrupted

    # directory

    def _resume(self) -> RunState:
        """Where the run stands, by its newest sound checkpoint; collective."""
        found = checkpoint.latest(self.directory / "checkpoints")
        if found is None:
            return RunState()
        path, state = found
        checkpoint.load(path, self.policy)
        self.policy.num_updates = state.step
        self.order.position = state.position
        if self.samples:
            problems = {problem.id: problem for problem in self.problems}
            ahead = saving.load(path, self.collector, problems)
            for rollout, batch in ahead.items() if self.ranks.is_main else ():
                self.ahead.put(rollout, batch)
        if self.ranks.is_main:
            logger.warning("resuming from %s", path)
        return state

    def _start_log(self) -> None:
        self._log = None
        self._bar = tqdm(
            total=self.config.rollouts,
            initial=self.state.rollout,
            desc=self.config.objective.name,
            unit="rollout",
            disable=not self.ranks.is_main,
            dynamic_ncols=True,
        )
        self.callback(self._bar.close)
        if self.ranks.is_main:
            self.directory.mkdir(parents=True, exist_ok=True)
            recipe.save(self.config, self.directory / "config.yaml")
            last = self.state.step if self.state.rollout else -1
            self._log = MetricsLog(self.directory, self.config.logging, last)
            self.enter_context(self._log)

    def keep_answers(self, batch: Batch) -> None:
        """Write what a rollout trains on, where the recipe asks for it."""
        every, rollout = self.config.logging.answers_every, self.state.rollout + 1
        if self.ranks.is_main and every and rollout % every == 0:
            folder = self.directory / "rollouts"
            folder.mkdir(exist_ok=True)
            write_groups(folder / f"rollout_{rollout}.parquet", batch.groups)

    def engine_metrics(self) -> dict[str, float]:
        """What the engine said of itself since the last call; servers' troubles in all."""
        found, self.sampled = self.sampled, {}
        return found | (dict(self.engine.counts) if self.engine else {})

    def log(self, record: dict[str, Any]) -> None:
        """Append a step's record to the run's metrics, and show how it goes."""
        if not self._log:
            return
        self._log.write(record)
        shown = {k: v for k, v in record.items() if k == "accuracy_all" or k.endswith("/accuracy")}
        self._bar.set_postfix({k: f"{v:.1%}" for k, v in shown.items()}, refresh=False)
        self._bar.update(record["rollout"] - self._bar.n)

    @property
    def is_finished(self) -> bool:
        """True after the last rollout, or once the last evaluation was good enough."""
        enough = self.config.evaluate.stop_at_accuracy
        good = enough > 0 and self.state.accuracy >= enough
        return good or self.state.rollout >= self.config.rollouts

    def save(self, evaluated: Mapping[str, float]) -> None:
        """Write a checkpoint; waits for what is being sampled.

        The run outlives a full disk: the failure is told and counted, and the next save is another.

        Args:
            evaluated: what was measured of these very weights; empty where nothing was.
        """
        self._settle()
        options, directory = self.config.checkpoint, self.directory / "checkpoints"
        add = partial(saving.save, collector=self.collector, ahead=self.ahead.settle())
        value = evaluated.get(options.best, mean_accuracy(evaluated)) if evaluated else None
        state = replace(self.state, position=self.order.position)
        state = checkpoint.with_best(directory, state, options.best, value)
        try:
            checkpoint.save(directory, self.policy, state, options.keep, add)
            self.state, self._saved_rollout = state, state.rollout
        except checkpoint.CheckpointError as error:
            self.checkpoints_failed += 1
            if self.ranks.is_main:
                logger.error("%s; the run goes on", error)

    def export(self) -> None:
        """Leave the policy as a Hugging Face directory, `hf`; collective."""
        self.watchdog.enter("export")
        source, out = Path(self.config.model.path), self.directory / "hf"
        megatron_to_hf.export(self.policy.chunks, self.policy.hf_config, source, out)
        if self.config.checkpoint.check_export:
            largest = check_export(self.policy, out, self.problems)
            if self.ranks.is_main:
                tqdm.write(f"transformers agrees with the policy: max |Δlogp| {largest:.1e}")


def _mix(*numbers: int) -> int:
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
