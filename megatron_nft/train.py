"""One training run, as every process runs it: Algorithm 1 of arXiv 2505.18116.

    for each rollout:
        sample K answers to each question, judge them, keep the groups with right and wrong ones
        compute the old log-probabilities
        for each mini-batch of questions: one optimizer step on the objective
        hand the new weights to the engine; evaluate and save when due

Where we differ from the paper: the loss is a mean over the mini-batch's tokens, not a sum. With
the objective `sft` the "rollout" is read from the data's worked solutions.

Run as `torchrun … -m megatron_nft.train RECIPE.yaml [key=value …]`, or let `megatron-nft train`
start the processes.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from megatron_nft import old_logp, preflight, recipe
from megatron_nft.config import Config
from megatron_nft.evaluate import table
from megatron_nft.metrics import read_metrics
from megatron_nft.notice import REQUEUE, Interrupted, Notice
from megatron_nft.policy import fp8, parallel
from megatron_nft.policy.packing import Sequence, sequences_of
from megatron_nft.processes import end_with_parent
from megatron_nft.rollout.groups import Group
from megatron_nft.run import Run
from megatron_nft.statistics import mean_accuracy, rollout_statistics, step_statistics


def train(config: Config, notice: Notice) -> int:
    """Run the recipe to its end, from where it stands in its directory; an exit code.

    After a scheduler's notice that is REQUEUE: started again, the run goes on where it stands.
    """
    with Run(config, notice) as run:
        is_new = run.state.step == 0 and run.evaluates_after(run.state)
        if is_new and not run.is_noticed():
            run.log({"step": 0, "rollout": 0, **run.evaluate()})
        while not run.is_finished:
            if run.is_noticed():
                run.save_for_later()
                return REQUEUE
            with suppress(Interrupted):
                one_rollout(run)
        run.finish_saving()
        run.export()
    return 0


def one_rollout(run: Run) -> None:
    """Sample, judge, update; evaluate and save when due."""
    batch = run.collect()
    run.keep_answers(batch)
    run.finish_saving(wait=False)
    config, timer, state = run.config, run.timer, run.state
    with timer.phase("old_logp"):
        groups, drift = with_old_logp(run, batch.groups)
    step, record_ = state.step, {}
    for minibatch in minibatches(groups, config):
        if record_:
            run.log(record_)
        step += 1
        lr = learning_rate(config, step)
        with timer.phase("update"):
            measured = run.updates.step(step, minibatch, lr)
        record_ = {"step": step, "rollout": state.rollout + 1, "lr": lr}
        record_["steps_skipped"] = run.updates.skipped.total
        if measured is None:
            continue
        record_ |= step_statistics(measured, minibatch, config.objective)
        if step == state.step + 1 and run.samples and config.old_logp == "rollout":
            drift = old_logp.of_update(measured["log_ratio"], minibatch, state.rollout)
            old_logp.act_on(drift, config.drift)
    record_ |= rollout_statistics(groups, batch.tally, timer, state.rollout) | drift
    state = run.state = replace(state, rollout=state.rollout + 1, step=step)
    evaluated = run.evaluate() if run.evaluates_after(state) else {}
    record_ |= evaluated | {"checkpoints_failed": run.checkpoints_failed}
    run.state = replace(state, accuracy=mean_accuracy(evaluated))
    # the record before the checkpoint: a resumed run can cut a record, but not make up for one
    run.log(run.sampler.metrics() | record_ | timer.metrics())
    timer.reset()
    run.finish_saving(wait=False)  # counted with the next rollout
    if run.saves_after(run.state):
        run.save(evaluated)


def with_old_logp(
    run: Run, groups: list[Group]
) -> tuple[list[tuple[Group, list[Sequence]]], dict[str, float]]:
    """The groups as the policy sees them, and how far the engine is from it if that is known."""
    longest, buffer = run.config.rollout.max_response_tokens, run.config.objective.overlong_buffer
    per_group, drift = [sequences_of([group], longest, buffer) for group in groups], {}
    if run.samples and run.config.old_logp == "trainer":
        flat = [sequence for sequences in per_group for sequence in sequences]
        flat, drift = old_logp.by_trainer(run.policy, flat, run.config.drift)
        old_logp.act_on(drift, run.config.drift)
        fresh = iter(flat)
        per_group = [[next(fresh) for _ in sequences] for sequences in per_group]
    return list(zip(groups, per_group, strict=True)), drift


def minibatches(
    groups: list[tuple[Group, list[Sequence]]], config: Config
) -> Iterator[list[Sequence]]:
    """Whole groups, `questions_per_minibatch` at a time, once per epoch."""
    size = config.optimizer.questions_per_minibatch
    for _ in range(config.optimizer.epochs):
        for start in range(0, len(groups), size):
            yield [s for _, sequences in groups[start : start + size] for s in sequences]


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up over `warmup_rollouts`, then constant; `step` counts from 1."""
    options = config.optimizer
    per_rollout = config.rollout.questions // options.questions_per_minibatch * options.epochs
    warmup = options.warmup_rollouts * per_rollout
    return options.lr * min(1.0, step / warmup) if warmup else options.lr


def evaluate_once(config: Config, notice: Notice) -> int:
    """Evaluate the recipe's model as it is; the numbers go into metrics.jsonl and to the reader."""
    with Run(config, notice) as run:
        run.log({"step": 0, "rollout": 0} | run.evaluate())
        if run.ranks.is_main:
            print(table(read_metrics(run.directory)[-1], config), flush=True)
    return 0


@record
def run_process(path: Path, overrides: list[str], verb: str = "train") -> int:
    """What every process under torchrun does; its exit code."""
    end_with_parent()
    work = {"train": train, "evaluate": evaluate_once}[verb]
    with Notice() as notice:
        return _run_noticed(path, overrides, work, notice)


def _run_noticed(
    path: Path, overrides: list[str], work: Callable[[Config, Notice], int], notice: Notice
) -> int:
    config = recipe.load(path, overrides)
    fp8.check_environment(config.fp8)
    # rank 0 may wait for a server in the middle of a hand-over
    timeout_s = max(1800.0, 3 * config.rollout.start_timeout_s)
    parallel.initialize(config.parallel, config.seed, timeout_s)
    check_once(config)
    code = work(config, notice)
    parallel.finalize()  # not after an exception: the others may be waiting in a collective
    return code


def check_once(config: Config) -> None:
    """Rank 0 looks at everything that the recipe names; all ranks raise what it finds."""
    complaint: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            preflight.check(config, dist.get_world_size())
        except ValueError as error:
            complaint = [str(error)]
    dist.broadcast_object_list(complaint, src=0)
    if complaint[0]:
        raise ValueError(complaint[0])


if __name__ == "__main__":
    sys.exit(run_process(Path(sys.argv[1]), sys.argv[2:]))
