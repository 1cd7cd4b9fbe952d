"""Save and resume: Megatron-Core's distributed checkpoint of the policy and its optimizer.

A checkpoint is complete only once its marker file exists; the marker also holds the run's state.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel

from checkpoints_conversion.hf_writer import carry_over
from checkpoints_conversion.megatron_names import HF_FILES, RUN_STATE
from megatron_nft.policy import host
from megatron_nft.policy.optimizer import gradient_buffers, torch_optimizers
from megatron_nft.policy.step import Policy

# Optimizer state by parameter, not by rank: it can be loaded at another TP, PP or DP.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True)
class RunState:
    """Where a run stands, between two rollouts."""

    rollout: int = 0  # rollouts finished
    step: int = 0  # optimizer steps taken
    position: int = 0  # questions taken from the data
    accuracy: float = 0.0  # of the last evaluation, the mean over its sets


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


def save(
    directory: Path,
    policy: Policy,
    state: RunState,
    keep: int,
    add: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write `directory/rollout_N`, mark it complete, and drop all but the newest `keep`.

    Collective. `add` writes more into the directory, on rank 0 and before it is complete.
    """
    check(policy)
    path = directory / f"rollout_{state.rollout}"
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(_sharded_state(policy), str(path), content_metadata=METADATA)
    dist.barrier()
    if dist.get_rank() == 0:
        _add_model_files(path, Path(policy.config.model.path))
        add(path)
        temporary = path / (RUN_STATE + ".partial")
        content = {"state": asdict(state), "parallel": asdict(policy.config.parallel)}
        temporary.write_text(json.dumps(content))
        temporary.rename(path / RUN_STATE)
        for old in _complete(directory)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def latest(directory: Path) -> tuple[Path, RunState] | None:
    """The newest complete checkpoint and the run's state there; None where there is none."""
    if not (complete := _complete(directory)):
        return None
    marker = complete[-1] / RUN_STATE
    try:
        content = json.loads(marker.read_text())
        return complete[-1], RunState(**content["state"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{marker}: damaged, or of another version of this program ({error}); "
            "remove this checkpoint, or begin in another run_dir"
        ) from error


def load(path: Path, policy: Policy) -> None:
    """Restore the policy's weights and its optimizer; collective."""
    _create_adam_state(policy)
    wanted = _sharded_state(policy, is_loading=True)
    loaded = dist_checkpointing.load(wanted, str(path))
    for name, chunk in _chunks(policy).items():
        chunk.load_state_dict(loaded[name])
    hooks = [
        optimizer.register_load_state_dict_post_hook(_steps_to_numbers)
        for optimizer in torch_optimizers(policy.optimizer)
    ]
    policy.optimizer.load_state_dict(loaded["optimizer"])
    for hook in hooks:
        hook.remove()
    _separate_adam_steps(policy)


def _complete(directory: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    found = [marker.parent for marker in directory.glob(f"rollout_*/{RUN_STATE}")]
    return sorted(found, key=lambda path: int(path.name.removeprefix("rollout_")))


def _add_model_files(path: Path, source: Path) -> None:
    """Configuration and tokenizer, so that a checkpoint can be converted by itself."""
    (path / HF_FILES).mkdir()
    carry_over(source, path / HF_FILES)


def _sharded_state(policy: Policy, is_loading: bool = False) -> dict[str, Any]:
    model = {name: chunk.sharded_state_dict() for name, chunk in _chunks(policy).items()}
    optimizer = policy.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=METADATA)
    return {**model, "optimizer": optimizer}


def _chunks(policy: Policy) -> dict[str, GPTModel]:
    """The model's chunks by a name of their own; in the files only parameters have names."""
    return {f"model{number}": chunk for number, chunk in enumerate(policy.chunks)}


def _create_adam_state(policy: Policy) -> None:
    """A fresh torch Adam has no moments yet, so that there would be nothing to load them into."""
    for optimizer in torch_optimizers(policy.optimizer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if not optimizer.state[parameter]:
                    optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def _steps_to_numbers(optimizer: torch.optim.Optimizer) -> None:
    """Hide torch Adam's tensor `step` from Megatron, which would look for it in every parameter's
    file and not find it; it comes with the parameter groups.
    """
    for state in optimizer.state.values():
        state["step"] = float(state["step"])


def _separate_adam_steps(policy: Policy) -> None:
    """Give each parameter a `step` tensor of its own, as torch's Adam counts it up in place.

    Megatron shares one among all of them; the resumed run would silently diverge.
    """
    for optimizer in torch_optimizers(policy.optimizer):
        for state in optimizer.state.values():
            state["step"] = torch.tensor(float(state["step"]))
