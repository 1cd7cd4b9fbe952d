"""Megatron-Core's distributed checkpoints: under which key a parameter lies, and where in it.

The layers' parameters of one kind are one tensor with a leading dimension of layers, and for
experts a second one; a norm has the name of the linear layer that Transformer Engine fuses it with,
whichever layers computed it (gpt_layer_specs.py: sharded_state_dict_keys_map).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from checkpoints_conversion.mapping import Sizes

HF_FILES = "hf"  # in a checkpoint's directory: the model's configuration and tokenizer
RUN_STATE = "complete.json"  # in a training run's: where the run stood, and its layout
FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
# what a checkpoint holds besides a model's parameters
OTHER_PREFIXES = ("optimizer.", "chained_", "common_state", "rng_state", "rerun_state_machine")
LAYERED = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(.*)")
# Modules that may keep an empty extra state, Transformer Engine's or the local ones.
# Megatron asks for the states of those that it has, and there may be more.
STATEFUL = (
    "input_layernorm",
    "pre_mlp_layernorm",
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
STATEFUL_EXPERT = ("linear_fc1", "linear_fc2")
FINAL_STATE = "decoder.final_layernorm._extra_state"


@dataclass(frozen=True)
class Stack:
    """A parameter's place in the checkpoint: a tensor's key, and its index in the leading
    dimensions, of the sizes `counts`.
    """

    key: str
    index: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()


def stacks(name: str, sizes: Sizes) -> list[Stack]:
    """Where a parameter with this name (a family table's) may lie, the most usual place first."""
    if not (layered := LAYERED.fullmatch(name)):
        return [Stack(name)]
    layer, rest = int(layered[1]), layered[2]
    index, counts, prefix = (layer,), (sizes.num_layers,), "decoder.layers."
    if expert := EXPERT.fullmatch(rest):
        rest = f"mlp.experts.experts.{expert[2]}"
        index, counts = (layer, int(expert[1])), (*counts, sizes.num_experts)
    # with a mixture of experts the norm before it is fused by some specs only
    kinds = [FUSED_NORMS[rest], rest] if rest in FUSED_NORMS else [rest]
    if sizes.num_experts and rest == "pre_mlp_layernorm.weight":
        kinds.reverse()
    stacked = [Stack(prefix + kind, index, counts) for kind in kinds]
    # Megatron can also be told to keep the layers apart (non_homogeneous_layers)
    apart = [Stack(f"{prefix}{layer}.{kind}", index[1:], counts[1:]) for kind in kinds]
    return stacked + apart


def written_stacks(name: str, sizes: Sizes) -> list[Stack]:
    """Where a parameter is written: once, but for the norm that specs look for in two places."""
    found = [stack for stack in stacks(name, sizes) if not LAYERED.fullmatch(stack.key)]
    both = sizes.num_experts and name.endswith("pre_mlp_layernorm.weight")
    return found if both else found[:1]


def extra_states(sizes: Sizes) -> Iterator[str]:
    """Keys of the modules' extra states, in Megatron's notation `key/shard_index_counts`."""
    for layer in range(sizes.num_layers):
        for module in STATEFUL:
            yield f"decoder.layers.{module}._extra_state/shard_{layer}_{sizes.num_layers}"
        for expert in range(sizes.num_experts):
            for module in STATEFUL_EXPERT:
                yield (
                    f"decoder.layers.mlp.experts.experts.{module}._extra_state/"
                    f"shard_{layer}.{expert}_{sizes.num_layers}.{sizes.num_experts}"
                )
    yield FINAL_STATE + "/shard_0_1"


def parameter_keys(keys: Iterable[str]) -> set[str]:
    """Those of a model's parameters among a checkpoint's keys."""
    return {key for key in keys if not key.startswith(OTHER_PREFIXES) and "_extra_state" not in key}
