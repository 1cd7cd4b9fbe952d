"""The plan's bytes against those of Megatron's own collectives, counted as a layer calls them."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig, Qwen2Config

from megatron_nft.config import Config, ModelConfig, ParallelConfig
from megatron_nft.plan.layers import exchanged_bytes
from megatron_nft.plan.parameters import pretended
from megatron_nft.policy import host
from megatron_nft.policy.architecture import chunks_of, transformer_config
from megatron_nft.policy.packed_row import pack_row

ROWS = 64
DENSE = Qwen2Config(
    architectures=["Qwen2ForCausalLM"],
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=512,
)


class Counted(TorchDispatchMode):
    """Bytes that this rank sends in a ring, by what is called."""

    def __init__(self, num_ranks: int) -> None:
        super().__init__()
        self.others, self.sent = num_ranks - 1, 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func.name().split(".")[0]
        if name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            part = args[1] if "gather" in name else args[0]
            self.sent += self.others * part.nbytes
        elif name == "c10d::allreduce_":
            whole = args[0][0].nbytes
            self.sent += 2 * whole * self.others / (self.others + 1)
        return func(*args, **(kwargs or {}))


def sent_by_a_layer(hf_config: PretrainedConfig, parallel: ParallelConfig) -> tuple[float, float]:
    """In forward and in backward, of a real layer whose ranks are pretended."""
    host.prepare()
    num_ranks = parallel.tensor * parallel.context
    config = Config(model=ModelConfig(path="m", dtype="float32", layers="torch"), parallel=parallel)
    with pretended(parallel, 0, num_ranks):
        [chunk] = chunks_of(hf_config, transformer_config(hf_config, config))
        layer = chunk.decoder.layers[0]
        rows = ROWS // parallel.context // (parallel.tensor if parallel.sequence else 1)
        hidden = torch.zeros(rows, 1, hf_config.hidden_size, requires_grad=True)
        row = pack_row((ROWS,), torch.device("cpu"), 0, parallel.context)
        with Counted(num_ranks) as forward:
            output, _ = layer(hidden, attention_mask=None, packed_seq_params=row)
        with Counted(num_ranks) as backward:
            output.sum().backward()
    return forward.sent, backward.sent


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tensor=2),
        ParallelConfig(tensor=4),
        ParallelConfig(tensor=4, sequence=True),
        ParallelConfig(context=2),
        ParallelConfig(context=4),
    ],
    ids=["TP2", "TP4", "TP4·SP", "CP2", "CP4"],
)
def test_a_dense_layer_sends_what_the_plan_says(parallel: ParallelConfig) -> None:
    config = Config(model=ModelConfig(dtype="float32", layers="torch"), parallel=parallel)
    [kind] = exchanged_bytes(DENSE, config, 1, is_backward=False)
    rows = ROWS / parallel.context
    expected = [
        exchanged_bytes(DENSE, config, rows, is_backward=is_backward)[kind]
        for is_backward in (False, True)
    ]
    forward, backward = sent_by_a_layer(DENSE, parallel)
    assert forward == pytest.approx(expected[0], rel=0.01)
    assert backward == pytest.approx(expected[1], rel=0.01)
