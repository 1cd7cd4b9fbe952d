"""Counted work against torch's own count on transformers' model, and parameters against its."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_nft.policy.flops import (
    attention_share,
    forward_flops,
    layer_matmul_parameters,
    matmul_parameters,
)

LENGTH = 24
SHAPES = {
    "grouped heads": {},
    "one key-value head": {"num_key_value_heads": 1},
    "heads of their own size": {"head_dim": 16},
    "one layer": {"num_hidden_layers": 1},
    "tied": {"tie_word_embeddings": True},
    "norms of heads": {"model_type": "qwen3", "head_dim": 16},
    "experts": {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    },
    "wide experts": {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 3},
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    sizes = {
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
    changes = {"model_type": "qwen2"} | request.param
    found = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes | changes))
    found.config.architectures = [type(found).__name__]  # as in a directory's config.json
    return found


def counted(model: PreTrainedModel, length: int, num_predicted: int = 0) -> tuple[int, int]:
    """Torch's count of one forward pass: the weights' products, and attention, not causal.

    The last `num_predicted` tokens go through the head; 0: all.
    """
    tokens = torch.zeros(1, length, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens, logits_to_keep=num_predicted, use_cache=False)
    return products_of(counter), attention_of(counter)


def products_of(counter: FlopCounterMode) -> int:
    operations = counter.get_flop_counts()["Global"].items()
    return sum(n for operation, n in operations if operation != torch.ops.aten.bmm)


def attention_of(counter: FlopCounterMode) -> int:
    """Batched products, except that the rotary embedding makes its angles by one."""
    counts = counter.get_flop_counts()
    modules = [name for name in counts if name.endswith(".self_attn")]
    return sum(counts[name][torch.ops.aten.bmm] for name in modules)


def test_a_forward_pass_costs_what_torch_counts(model: PreTrainedModel) -> None:
    products, attention = counted(model, LENGTH)
    assert forward_flops(model.config, [LENGTH]) == pytest.approx(products + attention / 2)


def test_the_head_costs_only_the_tokens_that_it_predicts(model: PreTrainedModel) -> None:
    products, attention = counted(model, LENGTH, num_predicted=5)
    ours = forward_flops(model.config, [LENGTH], num_predicted=5)
    assert ours == pytest.approx(products + attention / 2)


def test_sequences_cost_what_they_cost_alone(model: PreTrainedModel) -> None:
    lengths = [3, LENGTH, 11]
    parts = [counted(model, length) for length in lengths]
    expected = sum(products + attention / 2 for products, attention in parts)
    assert forward_flops(model.config, iter(lengths)) == pytest.approx(expected)


def test_attention_is_a_share_of_the_products(model: PreTrainedModel) -> None:
    products, attention = counted(model, LENGTH)
    assert attention_share(model.config) * LENGTH == pytest.approx(attention / 2 / products)


def test_backward_takes_twice_the_work(model: PreTrainedModel) -> None:
    """So that a step is three forward passes."""
    tokens = torch.zeros(1, LENGTH, dtype=torch.long)
    products, _ = counted(model, LENGTH)
    with FlopCounterMode(display=False) as counter:
        model(tokens, use_cache=False).logits.sum().backward()
    assert products_of(counter) == 3 * products


def test_parameters_are_those_of_the_model_s_matrices(model: PreTrainedModel) -> None:
    of_layer = in_matrices(model.model.layers[0])
    assert layer_matmul_parameters(model.config) == of_layer
    of_head = in_matrices(model.lm_head)  # a tied head multiplies too
    assert matmul_parameters(model.config) == of_layer * len(model.model.layers) + of_head


def in_matrices(module: torch.nn.Module) -> int:
    """Elements of the matrices that a token meets; a layer's experts are in one tensor each."""
    parameters = [p for p in module.parameters() if p.dim() > 1]
    return sum(p.numel() if p.dim() == 2 else p[0].numel() * chosen(module) for p in parameters)


def chosen(layer: torch.nn.Module) -> int:
    return layer.mlp.gate.top_k
