"""Save and resume: Megatron-Core's distributed checkpoint of the policy and its optimizer.

A checkpoint is begun with a copy of the state, which may be written while the policy goes on, and
appears under its name when all of it is on the disk (checkpoint_files.py). A resume takes the
newest that still is what was written. What a file system refuses to one rank, all ranks know of.
"""

import logging
import math
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoints_conversion.hf_writer import carry_over
from checkpoints_conversion.megatron_names import HF_FILES
from megatron_nft.policy import checkpoint_files as files
from megatron_nft.policy import host, shards, training_state
from megatron_nft.policy.checkpoint_files import Marker
from megatron_nft.policy.optimizer import gradient_buffers
from megatron_nft.policy.step import Policy

logger = logging.getLogger(__name__)


class CheckpointError(OSError):
    """What a file system refused to a rank; raised on all of them."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands, between two rollouts."""

    rollout: int = 0  # rollouts finished
    step: int = 0  # optimizer steps taken
    position: int = 0  # questions taken from the data
    accuracy: float = 0.0  # of the last evaluation, the mean over its sets
    best_metric: str = ""  # checkpoint.best when best_value was found
    best_value: float = 0.0
    best_rollout: int = 0  # whose checkpoint is the best; 0: none yet
    steps_skipped: int = 0  # see updates.py
    skipped_in_a_row: int = 0


OF_THE_BEST = ("best_metric", "best_value", "best_rollout")  # fields of a RunState


def with_best(directory: Path, state: RunState, metric: str, value: float | None) -> RunState:
    """The state with the best checkpoint that there is, once this one is saved.

    Args:
        metric: what is compared; empty: nothing is.
        value: of the metric at this very rollout; None where it was not measured.
    """
    if metric != state.best_metric or not files.path_of(directory, state.best_rollout).exists():
        state = replace(state, best_metric=metric, best_value=0.0, best_rollout=0)
    if not metric or value is None or not math.isfinite(value):
        return state
    if state.best_rollout and value <= state.best_value:
        return state
    return replace(state, best_value=value, best_rollout=state.rollout)


def check(policy: Policy) -> None:
    """Refuse an optimizer that Megatron would silently save wrongly; collective.

    Its fully reshardable format looks for the buckets of a gradient buffer where they lie with the
    padding between them, in a copy that has none (distrib_optimizer.py knows it as issue 504). Only
    a tied embedding on several pipeline stages has a bucket to itself.

    Raises:
        ValueError: a bucket that another one follows is padded.
    """
    buffers = [b for chunk in policy.ddp_chunks for b in gradient_buffers(chunk)]
    inner = [bucket for buffer in buffers for bucket in buffer.buckets[:-1]]
    is_padded = any(bucket.numel_unpadded != bucket.grad_data.numel() for bucket in inner)
    found = torch.tensor(float(is_padded), device=host.device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    if found.item():
        raise ValueError(
            "parallel.distributed_optimizer=true with parallel.pipeline above 1: checkpoints of "
            "this tied model would be wrong (its layers or its embedding are no multiple of "
            "lcm(128, DP·CP) elements); set parallel.distributed_optimizer=false"
        )


@dataclass(frozen=True)
class Unfinished:
    """A checkpoint that is being written."""

    path: Path  # where it is to be
    state: RunState
    done: Future[None]  # CheckpointError on all ranks where it failed on one


def begin(
    directory: Path,
    policy: Policy,
    state: RunState,
    add: Callable[[Path], None] = lambda _: None,
    *,
    group: dist.ProcessGroup | None = None,
) -> Unfinished:
    """Begin `directory/rollout_N`, for `finish` to end; collective.

    Args:
        add: writes more into the directory, on rank 0 and at once.
        group: of all ranks, on gloo and for this alone: a thread writes, from a copy in host
            memory, and gives the checkpoint its name, while the policy may change. Without one all
            of that has been done when this returns.

    Raises:
        CheckpointError: the file system has no room, or refused something; nothing has changed but
            that `directory/rollout_N.partial` is gone. Raised on all ranks.
    """
    check(policy)
    path = files.path_of(directory, state.rollout)
    content = {"state": asdict(state), "parallel": asdict(policy.config.parallel)}
    with _given_up_together(path):
        partial_path = _on_main(partial(files.begin, path))
        plan = shards.plan(training_state.sharded(policy), partial_path, training_state.METADATA)
        _on_main(partial(files.check_room, directory, shards.total_bytes(plan)))
        _on_main(lambda: _add_more(partial_path, policy, add))
    shards.stage(plan, copies=group is not None)
    write = partial(_write, path, content, plan, group)
    return Unfinished(path, state, _begun(write) if group else _finished(write))


def finish(unfinished: Unfinished, keep: int) -> None:
    """Wait until a checkpoint has its name; then drop all but the newest `keep` and the best.

    Raises:
        CheckpointError: see begin.
    """
    unfinished.done.result()
    if dist.get_rank() == 0:
        _tidy(unfinished.path.parent, unfinished.state, keep)


def save(
    directory: Path,
    policy: Policy,
    state: RunState,
    keep: int,
    add: Callable[[Path], None] = lambda _: None,
) -> None:
    """Begin and finish."""
    finish(begin(directory, policy, state, add), keep)
    dist.barrier()


def latest(directory: Path) -> tuple[Path, RunState] | None:
    """The newest sound checkpoint and the run's state there; None where there is none. Collective.

    Damaged ones that are newer lose their names, and are otherwise left as they are.

    Raises:
        ValueError: all that there are are damaged, or the newest is of another version of ours.
    """
    damaged: dict[Path, str] = {}
    paths, aside = _on_main(lambda: _survey(directory))
    for path in reversed(paths):
        marker, trouble = _look_at(path)
        if marker and not trouble:
            state = _state_of(path, marker)
            _on_main(lambda: [files.set_aside(one) for one in damaged])
            return path, state
        damaged[path] = trouble
        if dist.get_rank() == 0:
            logger.error("checkpoint %s is damaged: %s; trying the one before", path, trouble)
    if damaged or aside:
        found = [f"{path}: {trouble}" for path, trouble in damaged.items()] + [*map(str, aside)]
        raise ValueError(
            "all checkpoints of this run are damaged; restore one of them from a copy, or move "
            "them away to begin from the start, or begin in another run_dir:\n  "
            + "\n  ".join(found)
        )
    return None


def load(path: Path, policy: Policy) -> None:
    """Restore the policy's weights and its optimizer; collective."""
    wanted = training_state.sharded(policy, is_loading=True)
    training_state.restore(policy, shards.load(wanted, path))


def _begun(function: Callable[[], None]) -> Future[None]:
    """A function in a thread that does not keep the process from ending."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except CheckpointError as error:
            future.set_exception(error)
        finally:
            if not future.done():
                future.set_exception(RuntimeError(f"its writer ended: {sys.exception()!r}"))

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future


def _finished(function: Callable[[], None]) -> Future[None]:
    future: Future[None] = Future()
    future.set_result(function())
    return future


def _write(
    path: Path, content: dict[str, Any], plan: shards.Plan, group: dist.ProcessGroup | None
) -> None:
    """Write what was staged, and give the checkpoint its name; collective in its group."""
    unfinished = files.named(path, files.PARTIAL)
    with _given_up_together(path, group):
        written = _to_main(shards.write(plan), group)
        _on_main(lambda: _complete(unfinished, content, plan, written), group)
        _on_main(partial(files.publish, unfinished, path), group)


def _complete(
    path: Path, content: dict[str, Any], plan: shards.Plan, written: list[shards.Written]
) -> None:
    """Write the index and then the marker, unless a rank could not write its part."""
    if errors := [one.error for one in written if one.error]:
        raise CheckpointError("; ".join(errors))
    shards.write_index(plan, path, written)
    known = {name: file for one in written for name, file in one.files.items()}
    described = files.describe_all(path, known)
    if unseen := known.keys() - described.keys():
        raise CheckpointError(f"rank 0 does not see {', '.join(sorted(unseen))} in {path}")
    files.write_marker(path, content, described)


@contextmanager
def _given_up_together(path: Path, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Where a block raises CheckpointError, which it does on all ranks, tidy up and say more."""
    try:
        yield
    except CheckpointError as error:
        why = _on_main(partial(_give_up, path, str(error)), group)
        raise CheckpointError(why) from error


def _tidy(directory: Path, state: RunState, keep: int) -> None:
    """Link to the best checkpoint, and remove what is not to be kept; nothing depends on it."""
    newest, best = (files.path_of(directory, n) for n in (state.rollout, state.best_rollout))
    try:
        files.link_best(directory, state.best_rollout)
        files.prune(directory, keep, newest, best)
    except OSError as error:
        logger.error("%s: %s; older checkpoints stay, and take room", directory, error)


def _give_up(path: Path, why: str) -> str:
    """Remove what there is of a checkpoint; what went wrong and what to do, in words."""
    directories = (path.parent, *path.absolute().parents)
    free = shutil.disk_usage(next(p for p in directories if p.is_dir())).free
    shutil.rmtree(files.named(path, files.PARTIAL), ignore_errors=True)
    useless = ", ".join(p.name for p in files.leftovers(path.parent))
    return (
        f"{path} was not saved: {why} ({free} bytes were free). Earlier checkpoints are as they "
        f"were. Make room{f' ({useless} can go)' if useless else ''} or lower checkpoint.keep"
    )


def _survey(directory: Path) -> tuple[list[Path], list[Path]]:
    """The complete checkpoints, oldest first, and the damaged ones that were set aside."""
    files.finish_interrupted(directory)
    aside = [p for p in files.leftovers(directory) if p.suffix == files.DAMAGED]
    return files.complete(directory), aside


def _look_at(path: Path) -> tuple[Marker | None, str]:
    """A checkpoint's marker, and what is wrong with its files; the ranks share these out."""
    marker, trouble = _on_main(lambda: _read_marker(path))
    if marker is None:
        return None, trouble
    if marker.files is None:
        if dist.get_rank() == 0:
            logger.warning("%s is of before checkpoints listed their files: not checked", path)
        return marker, ""
    by_size = sorted(marker.files, key=lambda name: (-marker.files[name].bytes, name))
    mine = by_size[dist.get_rank() :: dist.get_world_size()]
    troubles = [files.trouble(path, name, marker.files[name]) for name in mine]
    found: list[list[str | None]] = [[]] * dist.get_world_size()
    dist.all_gather_object(found, troubles)
    return marker, "; ".join(sorted(text for texts in found for text in texts if text))


def _read_marker(path: Path) -> tuple[Marker | None, str]:
    try:
        return files.read_marker(path), ""
    except ValueError as error:
        return None, str(error)


def _state_of(path: Path, marker: Marker) -> RunState:
    if unknown := marker.state.keys() - {field.name for field in fields(RunState)}:
        raise ValueError(
            f"{path} is of another version of this program: its state has {', '.join(unknown)}; "
            "go on with that version, or begin in another run_dir"
        )
    return RunState(**marker.state)


def _on_main(function: Callable[[], Any], group: dist.ProcessGroup | None = None) -> Any:
    """What rank 0 gets from a function, on every rank; collective.

    Raises:
        CheckpointError: it failed there; raised on all ranks.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except OSError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise CheckpointError(outcome[1])
    return outcome[0]


def _to_main(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's value, on rank 0; collective."""
    gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered, group=group)
    return gathered or []


def _add_more(path: Path, policy: Policy, add: Callable[[Path], None]) -> None:
    _add_model_files(path, policy)
    add(path)


def _add_model_files(path: Path, policy: Policy) -> None:
    """Configuration and tokenizer, so that a checkpoint can be converted by itself."""
    (path / HF_FILES).mkdir()
    carry_over(Path(policy.config.model.path), path / HF_FILES)
