"""The plan's activations against what autograd keeps of Megatron's real layers on a pretended GPU.

PyTorch's fake tensors run a GPU's path through the layers (the flash kernel, the fused norm and
SwiGLU) by shapes and dtypes alone. What is not in it: the allocator's gaps, the kernels' own
buffers, and Transformer Engine's layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from unittest import mock

import pytest
import torch
from processes import run
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers import PretrainedConfig, Qwen2Config, Qwen3Config

from megatron_nft.config import Config, MemoryConfig, ModelConfig, ParallelConfig
from megatron_nft.plan.memory import kept_and_once
from megatron_nft.plan.parameters import Held, held_by_ranks, pretended
from megatron_nft.policy import attention, host
from megatron_nft.policy.architecture import chunks_of, transformer_config
from megatron_nft.policy.packed_row import PackedRow, pack_row, varlen_of

ROWS = 1024  # a micro-batch's
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}
FAMILIES = {
    "qwen2": partial(Qwen2Config, architectures=["Qwen2ForCausalLM"], **SIZES),
    # heads wider than the hidden size together, and norms of queries and keys
    "qwen3": partial(Qwen3Config, architectures=["Qwen3ForCausalLM"], head_dim=64, **SIZES),
}
Case = tuple[str, str, str]  # family, layout, what is computed again
LAYOUTS = {
    "TP1": ParallelConfig(),
    "TP2": ParallelConfig(tensor=2),
    "TP4·SP": ParallelConfig(tensor=4, sequence=True),
    "CP2": ParallelConfig(context=2),
    "CP4": ParallelConfig(context=4),
}
MEMORIES = {
    "none": MemoryConfig(),
    "mlp": MemoryConfig(recompute="selective"),
    "full": MemoryConfig(recompute="full"),
}


def configured(layout: str, memory: str) -> Config:
    model = ModelConfig(path="m", dtype="bfloat16", layers="torch")
    return Config(model=model, parallel=LAYOUTS[layout], memory=MEMORIES[memory])


def kept_by_all() -> dict[Case, float]:
    """Bytes of a token that a layer keeps."""
    torch.compiler.set_stance("force_eager")  # no compiler for a GPU that is not there
    host.has_cuda = lambda: True
    attention._rotate_in_one_pass = attention._rotate  # nothing of its input is kept either way
    return {case: kept_by_a_layer(*case) for case in product(FAMILIES, LAYOUTS, MEMORIES)}


def kept_by_a_layer(family: str, layout: str, memory: str) -> float:
    """By the third one: what all share, as the sines of positions, is kept once."""
    config = configured(layout, memory)
    two, three = (FAMILIES[family](num_hidden_layers=number) for number in (2, 3))
    return kept_by_layers(three, config) - kept_by_layers(two, config)


def kept_by_layers(hf_config: PretrainedConfig, config: Config) -> float:
    parallel, num_ranks = config.parallel, config.parallel.tensor * config.parallel.context
    with pretended(parallel, 0, num_ranks), pretended_gpu():
        model_config = transformer_config(hf_config, config)
        model_config.use_cpu_initialization = True  # at first: there is no GPU to make them on
        [chunk] = chunks_of(hf_config, model_config)
        row = pack_row((ROWS // 4,) * 4, torch.device("cpu"), 0, parallel.context)
        varlen_of(row)  # here, as fake tensors have no numbers to count with
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            row, layers = on_gpu(row, mode), chunk.decoder.to("cuda")
            num_rows = ROWS // parallel.context // (parallel.tensor if parallel.sequence else 1)
            shape = num_rows, 1, hf_config.hidden_size
            hidden = torch.zeros(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            with kept() as tensors:
                layers(hidden_states=hidden, attention_mask=None, packed_seq_params=row)
            return distinct_bytes(tensors, layers) * parallel.context / ROWS


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Its number is 0, and it has no random states that recomputation could keep."""
    where = "megatron.core.tensor_parallel.random."
    with (
        mock.patch("torch.cuda.current_device", return_value=0),
        mock.patch(where + "_get_all_rng_states", return_value=()),
        mock.patch(where + "CudaRNGStatesTracker.fork", side_effect=nullcontext),
    ):
        yield


def on_gpu(row: PackedRow, mode: FakeTensorMode) -> PackedRow:
    def fake(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else mode.from_tensor(tensor).to("cuda")

    names = "cu_seqlens_q", "cu_seqlens_kv", "keys"
    segments = {name: fake(getattr(row.varlen, name)) for name in names}
    return replace(row, positions=fake(row.positions), varlen=replace(row.varlen, **segments))


@contextmanager
def kept() -> Iterator[list[Tensor]]:
    """The tensors that autograd saves."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


def distinct_bytes(tensors: list[Tensor], module: torch.nn.Module) -> int:
    """Of their storages, without the module's own."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    return sum(size for key, size in storages.items() if key not in own)


@pytest.fixture(scope="module")
def found() -> dict[Case, float]:
    return run(kept_by_all, 1)[0]


@pytest.mark.processes
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_keeps_what_the_plan_says(
    family: str, layout: str, memory: str, found: dict[Case, float]
) -> None:
    planned, _ = kept_and_once(FAMILIES[family](), configured(layout, memory))
    assert found[family, layout, memory] == pytest.approx(planned, rel=0.01)


PLANNED = {
    "TP2": (ParallelConfig(tensor=2), False),
    "PP2, tied": (ParallelConfig(pipeline=2), True),  # both stages have the embedding
}


def held(has_gpu: bool) -> tuple[list[list[Held]], bool]:
    """By this host, or as if it had a GPU; and whether one was used."""
    if has_gpu:
        host.has_cuda = lambda: True
    found = [
        held_by_ranks(
            FAMILIES["qwen2"](tie_word_embeddings=is_tied, num_hidden_layers=2),
            replace(configured("TP1", "none"), parallel=parallel),
            2,
        )
        for parallel, is_tied in PLANNED.values()
    ]
    return found, torch.cuda.is_initialized()


@pytest.mark.processes
def test_a_plan_on_a_gpu_s_host_makes_nothing_on_it() -> None:
    """Of dense models. Where there is no GPU, to touch it would be an error."""
    with_gpu, is_used = run(held, 1, True)[0]
    assert not is_used
    assert with_gpu == run(held, 1, False)[0][0]
