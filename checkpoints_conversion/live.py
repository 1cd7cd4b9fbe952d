"""The parameters of a live, split model under the names that the whole model gives them."""

import re
from collections.abc import Sequence

from megatron.core.models.gpt import GPTModel
from torch.nn import Parameter

# Transformer Engine keeps a norm's weight in the linear layer that it is fused with
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def named_parameters(chunks: Sequence[GPTModel]) -> dict[str, Parameter]:
    """This rank's parameters by the names of the families' tables: layers counted from the first
    pipeline stage on, norms apart. A tied model's head on the last stage, a copy of the embedding,
    is `output_layer.weight`.
    """
    return {
        _whole_name(name, chunk): parameter
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
    }


def _whole_name(name: str, chunk: GPTModel) -> str:
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
    if not match:
        return name
    number = chunk.decoder.layers[int(match[1])].layer_number - 1  # Megatron counts from 1
    return f"decoder.layers.{number}.{FUSED_NORMS.get(match[2], match[2])}"
