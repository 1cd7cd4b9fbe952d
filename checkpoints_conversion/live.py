"""The parameters of a live, split model under the names that the whole model gives them."""

import re
from collections.abc import Sequence

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from checkpoints_conversion.mapping import Mapping
from checkpoints_conversion.megatron_names import FUSED_NORMS, LAYERED

# Transformer Engine keeps a norm's weight in the linear layer that it is fused with
APART = {fused: apart for apart, fused in FUSED_NORMS.items()}
# experts of this rank, one module each or all in one of Transformer Engine's grouped layers
EXPERTS = (
    re.compile(r"mlp\.experts\.local_experts\.(?P<expert>\d+)\.(?P<rest>.*)"),
    re.compile(r"mlp\.experts\.(?P<rest>linear_fc\d\.weight)(?P<expert>\d+)"),
)


def named_parameters(chunks: Sequence[GPTModel]) -> dict[str, Parameter]:
    """This rank's parameters by the names of the families' tables: layers counted from the first
    pipeline stage on, experts from the first expert-parallel rank on, norms apart. A tied model's
    head on the last stage, a copy of the embedding, is `output_layer.weight`.
    """
    return {
        _whole_name(name, chunk): parameter
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
    }


def tensor_group(mapping: Mapping) -> ProcessGroup:
    """The ranks that hold one parameter's shards; experts have groups of their own."""
    if mapping.is_expert:
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def _whole_name(name: str, chunk: GPTModel) -> str:
    match = LAYERED.fullmatch(name)
    if not match:
        return name
    layer = chunk.decoder.layers[int(match[1])]
    rest = APART.get(match[2], match[2])
    for pattern in EXPERTS:
        if expert := pattern.fullmatch(rest):
            number = layer.mlp.local_expert_indices[int(expert["expert"])]
            rest = f"mlp.experts.{number}.{expert['rest']}"
    return f"decoder.layers.{layer.layer_number - 1}.{rest}"  # Megatron counts from 1
