"""What a training run holds in each process: questions, policy, sampler, directory."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoTokenizer

from checkpoints_conversion import hf_to_megatron, megatron_to_hf
from checkpoints_conversion.hf_files import read_hf_config
from megatron_nft import recipe
from megatron_nft.config import Config
from megatron_nft.export_check import check_export
from megatron_nft.lock import DirectoryLock
from megatron_nft.metrics import MetricsLog, PhaseTimer
from megatron_nft.notice import REQUEUE, Notice
from megatron_nft.policy import checkpoint
from megatron_nft.policy.checkpoint import RunState
from megatron_nft.policy.step import Policy
from megatron_nft.ranks import Ranks
from megatron_nft.rollout import saving
from megatron_nft.rollout.collect import Batch
from megatron_nft.rollout.groups import solved
from megatron_nft.rollout.records import keep, write_groups
from megatron_nft.sampler import Sampler
from megatron_nft.sources import Sources
from megatron_nft.statistics import mean_accuracy
from megatron_nft.updates import Skipped, Updates
from megatron_nft.verify.share import start_verifier
from megatron_nft.watchdog import Watchdog

logger = logging.getLogger("megatron_nft")


class Run(ExitStack):
    """A run from where it stands in its directory; leaving it ends what it started."""

    def __init__(self, config: Config, notice: Notice) -> None:
        super().__init__()
        self.config, self._notice = config, notice
        self.directory = Path(config.run_dir)
        self.ranks = Ranks()
        self.ranks.on_main(self._lock)
        logs, timeout_s = self.directory / "logs", config.watchdog.timeout_s
        self.watchdog = self.enter_context(Watchdog(logs, timeout_s, dist.get_rank()))
        self.timer = PhaseTimer(self.watchdog.enter)
        path = Path(config.model.path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        self.verifier = start_verifier(config, self.watchdog.beat)
        if self.verifier:
            self.enter_context(self.verifier)
        sources = Sources(config, tokenizer, self.verifier, self.ranks.on_main)
        self.problems = sources.training()
        self.eval_sets = sources.evaluation()
        hf_config = read_hf_config(path)
        fill = partial(hf_to_megatron.load, path=path, hf_config=hf_config)
        self.watchdog.enter("model")
        self.policy = Policy(config, hf_config, fill, self.watchdog.beat)
        checkpoint.check(self.policy)
        self.sampler = self.enter_context(self._new_sampler())
        self.watchdog.enter("resume")
        self.state = self._resume()
        self._saved_rollout = self.state.rollout
        self._unfinished: checkpoint.Unfinished | None = None
        self._writers = dist.new_group(backend="gloo") if config.checkpoint.in_background else None
        self.checkpoints_failed = 0  # since this process started
        skipped = Skipped(self.state.steps_skipped, self.state.skipped_in_a_row)
        folder = self.directory / "skipped" if self.ranks.is_main else None
        self.updates = Updates(self.policy, folder, config.optimizer.max_skipped_steps, skipped)
        self.watchdog.enter("engine")
        self._start_engine(tokenizer)
        self._start_log()

    def _lock(self) -> None:
        self.enter_context(DirectoryLock(self.directory))

    def _start_engine(self, tokenizer: Any) -> None:
        if self.samples or self.eval_sets:
            self.sampler.start(tokenizer)

    def _new_sampler(self) -> Sampler:
        return Sampler(
            self.config,
            self.problems,
            self.policy,
            self.verifier,
            ranks=self.ranks,
            timer=self.timer,
            watchdog=self.watchdog,
            notice=self._notice,
        )

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

    def collect(self) -> Batch:
        """The groups of one rollout: sampled, judged and counted, or the data's solutions."""
        if self.samples:
            return self.sampler.collect(self.state.rollout)
        taken = self.sampler.order.take(self.config.rollout.questions)
        return Batch([solved(problem) for problem in taken], None)

    def evaluate(self) -> dict[str, float]:
        """Accuracy on the held-out sets, by the newest weights; collective."""
        return self.sampler.evaluate(self.eval_sets, self.state.rollout)

    # the scheduler's notice

    def is_noticed(self) -> bool:
        """Whether any rank was told that the time is up; collective."""
        return self.ranks.any(self._notice.has_come)

    def save_for_later(self) -> None:
        """Leave a checkpoint of where the run stands, unless there is one; collective."""
        self.sampler.abandon()
        self.finish_saving()
        if self.state.rollout not in (0, self._saved_rollout):
            self.save({})
            self.finish_saving()
        if self.ranks.is_main:
            self._log.leave_unwritten()
            logger.warning(
                "told to stop after %d rollouts; start it again by the same command (exit code %d)",
                self._saved_rollout,
                REQUEUE,
            )

    # directory

    def _resume(self) -> RunState:
        """Where the run stands, by its newest sound checkpoint; collective."""
        found = checkpoint.latest(self.directory / "checkpoints")
        if found is None:
            return RunState()
        path, state = found
        checkpoint.load(path, self.policy)
        self.policy.num_updates = state.step
        self.sampler.order.position = state.position
        if self.samples:
            problems = {problem.id: problem for problem in self.problems}
            ahead = saving.load(path, self.sampler.collector, problems)
            for rollout, batch in ahead.items() if self.ranks.is_main else ():
                self.sampler.ahead.put(rollout, batch)
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
            path = self.directory / "rollouts" / f"rollout_{rollout}.parquet"
            keep(path, partial(write_groups, groups=batch.groups))

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
        """Begin to write a checkpoint; waits for what is being sampled, and for the one before.

        The run outlives a full disk: the failure is told and counted, and the next save is another.

        Args:
            evaluated: what was measured of these very weights; empty where nothing was.
        """
        self.finish_saving()
        options, directory = self.config.checkpoint, self.directory / "checkpoints"
        value = evaluated.get(options.best, mean_accuracy(evaluated)) if evaluated else None
        add = partial(self._save_more, ahead=self.sampler.settle())
        skipped = self.updates.skipped
        state = replace(
            self.state,
            position=self.sampler.order.position,
            steps_skipped=skipped.total,
            skipped_in_a_row=skipped.in_a_row,
        )
        state = checkpoint.with_best(directory, state, options.best, value)
        with self._saving():
            self._unfinished = checkpoint.begin(
                directory, self.policy, state, add, group=self._writers
            )
        if not self._writers:
            self.finish_saving()

    def finish_saving(self, *, wait: bool = True) -> None:
        """Take note of the checkpoint that was begun; unless `wait`, only if it has its name.

        Collective.
        """
        unfinished = self._unfinished
        if not unfinished or (not wait and self.ranks.any(not unfinished.done.done())):
            return
        self._unfinished = None
        with self._saving():
            checkpoint.finish(unfinished, self.config.checkpoint.keep)
            self._saved_rollout, saved = unfinished.state.rollout, unfinished.state
            best = {name: getattr(saved, name) for name in checkpoint.OF_THE_BEST}
            self.state = replace(self.state, **best)

    def _save_more(self, path: Path, ahead: Mapping[int, Batch]) -> None:
        """On rank 0. A resumed run can cut records, but not make up for those that are lost."""
        saving.save(path, self.sampler.collector, ahead)
        self._log.sync()

    @contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            with self.timer.phase("checkpoint"):
                yield
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
