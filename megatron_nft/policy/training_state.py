"""What a checkpoint holds of a policy: weights and optimizer, as Megatron-Core's sharded state."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from megatron_nft.policy.optimizer import torch_optimizers
from megatron_nft.policy.step import Policy

# Optimizer state by parameter, not by rank: it can be loaded at another TP, PP or DP.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


def sharded(policy: Policy, is_loading: bool = False) -> dict[str, Any]:
    """This rank's part of the state, to be saved or to be loaded into; collective."""
    _create_adam_state(policy)
    model = {name: chunk.sharded_state_dict() for name, chunk in _chunks(policy).items()}
    optimizer = policy.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=METADATA)
    return {**model, "optimizer": optimizer}


def restore(policy: Policy, loaded: dict[str, Any]) -> None:
    """Give the policy the state that was loaded into its own; collective."""
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


def _chunks(policy: Policy) -> dict[str, GPTModel]:
    """The model's chunks by a name of their own; in the files only parameters have names."""
    return {f"model{number}": chunk for number, chunk in enumerate(policy.chunks)}


def _create_adam_state(policy: Policy) -> None:
    """A fresh torch Adam has no moments: nothing to load into, and Megatron would not save it."""
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
