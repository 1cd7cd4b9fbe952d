"""What the two processes of tests/test_checkpoint.py do, and what is done to their directories."""

import os
import resource
import shutil
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from policies import configured, policy_of, weights_of
from reference import LR
from toys import random_sequences

from megatron_nft.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    LoggingConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    SourceConfig,
    VerifyConfig,
)
from megatron_nft.policy import checkpoint
from megatron_nft.policy.checkpoint import CheckpointError, RunState

NFT = ObjectiveConfig(name="nft")
LAYOUTS = {
    "TP1": ParallelConfig(),
    "TP2": ParallelConfig(tensor=2),
    "PP2": ParallelConfig(pipeline=2),
    "DP2": ParallelConfig(),
    "TP2, plain": ParallelConfig(tensor=2, distributed_optimizer=False),
}
MOVES = (("TP2", "TP1"), ("TP1", "TP2"), ("TP2", "DP2"), ("DP2", "TP2"), ("PP2", "TP2"))
STATE = RunState(rollout=1, step=7, position=5, accuracy=0.25)
ACCURACIES = {2: 0.6, 4: 0.5, 6: 0.7}  # by the rollout that they are measured after
MB = 1 << 20
SMALL_DISK = 3 * MB  # room for two checkpoints of the toy model, not for three


def new_policy(model: Path, layout: str) -> Any:
    from megatron_nft.policy import parallel

    parallel.lay_groups(LAYOUTS[layout], seed=0)
    return policy_of(configured(model, NFT, LAYOUTS[layout]))


def next_step(policy: Any, seed: int) -> dict[str, Any]:
    metrics = policy.update(random_sequences(13, seed=seed), LR)
    return {key: metrics[key] for key in ("loss", "grad_norm")} | {"weights": weights_of(policy)}


def stepped(model: Path, layout: str) -> Any:
    """A policy that has moments to be saved."""
    policy = new_policy(model, layout)
    next_step(policy, seed=0)
    return policy


def step_save_step(model: Path, folder: Path, layout: str) -> dict[str, Any]:
    """A step, a checkpoint, and what the uninterrupted run's next step is."""
    policy = stepped(model, layout)
    checkpoint.save(folder / layout, policy, STATE, keep=1)
    return next_step(policy, seed=1)


def save_step(model: Path, folder: Path) -> dict[str, Any]:
    """A checkpoint before any step, as where all so far were left out, and the step after it."""
    policy = new_policy(model, "DP2")
    checkpoint.save(folder, policy, STATE, keep=1)
    return next_step(policy, seed=1)


def resumed(model: Path, folder: Path, layout: str) -> tuple[RunState, dict[str, Any]]:
    """Another policy's next step, from the newest checkpoint of a folder."""
    policy = new_policy(model, layout)
    path, state = checkpoint.latest(folder)
    checkpoint.load(path, policy)
    return state, next_step(policy, seed=1)


def saves_twice(model: Path, folder: Path) -> dict[str, Any]:
    """Weights when they were saved, after a first and a second step, and from each checkpoint.

    Both are written in the background, after the policy has made its next step. Without the
    distributed optimizer what is saved is the policy's own tensors, not gathered copies.
    """
    policy = new_policy(model, "TP2, plain")
    saved, loaded, group = [], [], dist.new_group(backend="gloo")
    next_step(policy, seed=1)
    for rollout in (1, 2):
        saved.append(weights_of(policy))
        with writing_held_back() as is_stepped:
            begun = checkpoint.begin(folder, policy, RunState(rollout), group=group)
            assert not begun.done.done()
            next_step(policy, seed=rollout + 1)
            is_stepped.set()
            checkpoint.finish(begun, keep=2)
    for rollout in (1, 2):
        policy = new_policy(model, "TP2, plain")
        checkpoint.load(folder / f"rollout_{rollout}", policy)
        loaded.append(weights_of(policy))
    return {"saved": saved, "loaded": loaded, "next": next_step(policy, seed=3)}


@contextmanager
def writing_held_back() -> Iterator[threading.Event]:
    """No shard is written until the event is set."""
    from megatron_nft.policy import shards

    may_write, write = threading.Event(), shards.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "write", lambda plan: may_write.wait(60) and write(plan))
        yield may_write


def attempt(save: Callable[[], None]) -> str:
    """What a save says that fails."""
    try:
        save()
    except CheckpointError as error:
        return str(error)
    return ""


@contextmanager
def files_limited(num_bytes: int, rank: int) -> Iterator[None]:
    """No file of one rank grows beyond so many bytes: a write in its middle fails with EFBIG."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def failing_writes(model: Path, folder: Path) -> dict[str, Any]:
    """Saves of rollout 2 over an earlier one of that name, each failing elsewhere."""
    from megatron_nft.policy import shards

    policy, write_index = stepped(model, "TP2"), shards.write_index
    for rollout in (1, 2):
        checkpoint.save(folder, policy, RunState(rollout), keep=2)
    before = contents(folder)

    def save() -> None:
        next_step(policy, seed=2)
        checkpoint.save(folder, policy, RunState(2, step=9), keep=2)

    def limited_index(*args: Any) -> None:
        with files_limited(1000, rank=0):
            write_index(*args)

    found = {}
    for rank in (0, 1):
        with files_limited(10_000, rank):
            found[f"shard of rank {rank}"] = attempt(save)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "write_index", limited_index)
        found["index"] = attempt(save)
    dist.barrier()
    untouched = contents(folder) == before
    save()
    return {"errors": found, "untouched": untouched, "then": checkpoint.latest(folder)}


def on_small_disk(model: Path, disk: Path) -> dict[str, Any]:
    """A save that has no room, and one whose room another file takes while it is written."""
    policy, folder = stepped(model, "TP2"), disk / "policy"
    checkpoint.save(folder, policy, RunState(1), keep=1)
    (folder / "rollout_7.partial").mkdir(exist_ok=True)  # as a kill leaves it
    before, errors = contents(folder), {}
    with filled(disk / "others", leaving=MB // 4):
        errors["beforehand"] = attempt(lambda: checkpoint.save(folder, policy, RunState(2), 1))
    errors["meanwhile"] = attempt(
        lambda: checkpoint.save(folder, policy, RunState(2), 1, lambda path: fill(path / "more", 0))
    )
    dist.barrier()
    untouched, names = contents(folder) == before, names_in(folder)
    checkpoint.save(folder, policy, RunState(2), 1)
    then = names_in(folder)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    return {"errors": errors, "untouched": untouched, "names": names, "then": then}


@contextmanager
def filled(path: Path, leaving: int) -> Iterator[None]:
    """A file of rank 0 on its disk that leaves so little room."""
    if dist.get_rank() == 0:
        fill(path, leaving)
    dist.barrier()
    yield
    dist.barrier()
    if dist.get_rank() == 0:
        path.unlink()


def fill(path: Path, leaving: int) -> None:
    with path.open("wb", buffering=0) as file:
        while (free := shutil.disk_usage(path.parent).free) > leaving:
            file.write(bytes(min(MB, free - leaving)))
        if not leaving:
            file.write(b"one byte more than there is room for")


def written_anew(model: Path, folder: Path) -> list[Any]:
    """A damaged rollout 2 of two: where to resume from, and what lies there once it is saved."""
    policy = stepped(model, "TP2")
    for rollout in (1, 2):
        checkpoint.save(folder, policy, RunState(rollout), keep=2)
    if dist.get_rank() == 0:
        flip_a_bit(folder / "rollout_2" / "__1_0.distcp")
    dist.barrier()
    path, state = checkpoint.latest(folder)
    aside = names_in(folder)
    checkpoint.save(folder, policy, RunState(2), keep=2)
    return [path.name, state.rollout, aside, names_in(folder), checkpoint.latest(folder)[1].rollout]


@contextmanager
def world(meeting_point: Path, num_processes: int) -> Iterator[None]:
    """The first so many of the processes as a job of their own, as `parallel.initialize` has it."""
    from megatron_nft.policy import host, parallel

    host.prepare()
    host.limit_threads(2)
    init, rank = meeting_point.as_uri(), int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=init, world_size=num_processes, rank=rank)
    yield
    parallel.finalize()


def everything(root: Path, disk: Path | None) -> dict[str, Any]:
    """All that two processes do, the first of them alone in between; two whole runs among it."""
    model, saved = root / "model", root / "saved"
    with world(root / "pair", 2):
        found = {
            "through": {name: step_save_step(model, saved, name) for name in ("TP2", "PP2", "DP2")},
            "first step": save_step(model, root / "new"),
            "twice": saves_twice(model, root / "twice"),
            "failing": failing_writes(model, root / "failing"),
            "anew": written_anew(model, root / "anew"),
            "disk": on_small_disk(model, disk) if disk else None,
        }
        found["first step, resumed"] = resumed(model, root / "new", "DP2")[1]
        found["resumed"] = {
            move: resumed(model, saved / move[0], move[1]) for move in MOVES if "TP1" not in move
        }
    if os.environ["RANK"] == "0":
        with world(root / "alone", 1):
            found["resumed"]["TP2", "TP1"] = resumed(model, saved / "TP2", "TP1")
            found["through"]["TP1"] = step_save_step(model, saved, "TP1")
            found["best"] = a_run_with_a_best_checkpoint(root)
            if disk:
                a_run_on_a_small_disk(root, disk / "run")
    with world(root / "pair again", 2):
        found["resumed"]["TP1", "TP2"] = resumed(model, saved / "TP1", "TP2")
    return found


def recipe(root: Path, run_dir: Path, rollouts: int, **changes: Any) -> Config:
    """Supervised fine-tuning: a whole run that needs no engine."""
    source = SourceConfig(path=str(root / "rows.jsonl"), name="sums", solution="solution")
    return Config(
        run_dir=str(run_dir),
        rollouts=rollouts,
        model=ModelConfig(path=str(root / "model"), dtype="float32"),
        data=DataConfig(train=[source], template="raw", max_prompt_tokens=8),
        objective=ObjectiveConfig(name="sft"),
        rollout=RolloutConfig(questions=2, max_response_tokens=32),
        optimizer=OptimizerConfig(questions_per_minibatch=2, tokens_per_microbatch=64),
        logging=LoggingConfig(tensorboard=False),
        evaluate=EvaluateConfig(sets=[source] if "best" in changes else [], every=2),
        checkpoint=CheckpointConfig(every=1, keep=1, **changes),
        verify=VerifyConfig(workers=1),
    )


def a_run_with_a_best_checkpoint(root: Path) -> dict[int, tuple[list[str], str, RunState]]:
    """After each rollout: what lies in checkpoints/, where `best` leads, and the state.

    The accuracies were thought up, in place of an engine's; the run is resumed in its middle.
    """
    from megatron_nft.notice import Notice
    from megatron_nft.run import Run
    from megatron_nft.train import one_rollout

    class ThoughtUp(Run):
        def _start_engine(self, tokenizer: Any) -> None:
            pass

        def evaluate(self) -> dict[str, float]:
            return {"eval/sums/accuracy": ACCURACIES[self.state.rollout]}

    found, folder = {}, root / "best" / "checkpoints"
    for last in (3, 6):
        config = recipe(root, root / "best", rollouts=6, best="eval/sums/accuracy")
        with ThoughtUp(config, Notice()) as run_:
            while run_.state.rollout < last:
                one_rollout(run_)
                run_.finish_saving()
                link = folder / "best"
                target = os.readlink(link) if link.is_symlink() else ""
                names = [n for n in names_in(folder) if n != "best"]
                found[run_.state.rollout] = names, target, run_.state
    return found


def a_run_on_a_small_disk(root: Path, run_dir: Path) -> None:
    """A whole run that has room for its first checkpoint alone, and waits while it is written."""
    from megatron_nft.notice import Notice
    from megatron_nft.train import train

    others = run_dir.parent / "others"
    with filled(others, leaving=5 * MB // 4):
        train(recipe(root, run_dir, rollouts=3, in_background=False), Notice())


# what is done with directories


def contents(folder: Path) -> dict[str, int]:
    """Every file's CRC by its name."""
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {name: zlib.crc32(path.read_bytes()) for name, path in sorted(found.items())}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@contextmanager
def small_file_system(path: Path) -> Iterator[Path | None]:
    """A tmpfs of a few MB; None where this user may not mount one."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)
