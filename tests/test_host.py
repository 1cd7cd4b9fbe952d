"""What `prepare()` does to torch on a CPU host, and that it does nothing where there is CUDA.

Each test looks at a process of its own: what `prepare()` changes lasts as long as the process.
"""

from typing import Any

import pytest
import torch
from processes import run


def _cuda_names() -> dict[str, Any]:
    return dict(vars(torch.cuda))


def _num_modes() -> int:
    return torch._C._len_torch_function_stack()


def _raises(function: Any) -> bool:
    try:
        function()
    except (RuntimeError, AssertionError):
        return True
    return False


def _look_at_a_cpu_host() -> None:
    from megatron_nft.policy import host

    assert _raises(lambda: torch.zeros(2, device="cuda"))
    host.prepare()
    names, num_modes = _cuda_names(), _num_modes()
    host.prepare()
    assert _cuda_names() == names, "the second call changed torch.cuda"
    assert _num_modes() == num_modes == 1

    _check_accommodations()
    with host.suspended():
        _check_plain_torch()
    _check_accommodations()
    with pytest.raises(KeyError), host.suspended():
        raise KeyError
    _check_accommodations()

    assert torch.cuda.current_device() == "cpu"
    assert host.device() == torch.device("cpu")
    assert host.backend() == "gloo"
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
        torch.cuda.Event().record()
        torch.cuda.Stream().record_event().synchronize()
        torch.cuda.synchronize()
    _check_counts_of_tokens()


def _check_counts_of_tokens() -> None:
    """Of Megatron's expert dispatch: torch's all-to-all wants a list's like, no tensor."""
    from megatron.core.transformer.moe.token_dispatcher import maybe_move_tensor_to_cpu

    counts = torch.tensor([3, 0, 5])
    assert maybe_move_tensor_to_cpu(counts) is counts
    assert maybe_move_tensor_to_cpu(None, as_numpy=True) is None
    assert maybe_move_tensor_to_cpu(counts, as_numpy=True, record_stream=True).tolist() == [3, 0, 5]
    assert not torch.is_tensor(maybe_move_tensor_to_cpu(counts, as_numpy=True))


def _check_accommodations() -> None:
    devices = ("cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0))
    for device in devices:
        made = (
            torch.zeros(2, device=device),
            torch.empty(2, device=device, dtype=torch.int64),
            torch.tensor([1.0], device=device),
            torch.arange(3, device=device),
            torch.randn(2, device=device),
            torch.ones(2).new_zeros(3, device=device),
            torch.ones(2).to(device),
            torch.ones(2).to(device=device),
            torch.empty(2, pin_memory=True),
        )
        assert {x.device.type for x in made} == {"cpu"}
    x = torch.ones(2)
    assert x.cuda() is x
    assert x.type() == "torch.cuda.FloatTensor"
    assert x.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert x.type(torch.float64).dtype == torch.float64
    assert x.to(torch.float16).dtype == torch.float16
    assert torch.zeros(2, device="meta").device.type == "meta"


def _check_plain_torch() -> None:
    assert _raises(lambda: torch.zeros(2, device="cuda"))
    assert torch.ones(2).type() == "torch.FloatTensor"


def _look_at_random_states() -> None:
    from megatron.core import tensor_parallel

    from megatron_nft.config import ParallelConfig
    from megatron_nft.policy import parallel

    parallel.initialize(ParallelConfig(), seed=3)
    before = torch.get_rng_state()
    with tensor_parallel.get_cuda_rng_tracker().fork():
        first = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before), "the tracked state leaked"
    with tensor_parallel.get_cuda_rng_tracker().fork():
        second = torch.rand(4)
    assert not torch.equal(first, second), "the tracked state stands still"
    parallel.lay_groups(ParallelConfig(), seed=3)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        assert torch.equal(torch.rand(4), first)
    parallel.finalize()


def _on_a_cpu_host() -> None:
    _look_at_a_cpu_host()
    _look_at_random_states()


def _on_a_cuda_host() -> None:
    import sys

    torch.cuda.is_available = lambda: True
    names = _cuda_names()
    from megatron_nft.policy import host

    host.prepare()
    assert _cuda_names() == names
    assert _num_modes() == 0
    assert "megatron.core" not in sys.modules
    _check_plain_torch_types()
    with host.suspended():
        _check_plain_torch_types()
    assert host.backend() == "cpu:gloo,cuda:nccl"
    assert host.vllm_options(100) == {}
    assert "VLLM_CPU_KVCACHE_SPACE" not in host.vllm_environment(1)
    num_threads = torch.get_num_threads()
    host.limit_threads(10_000)
    assert torch.get_num_threads() == num_threads


def _check_plain_torch_types() -> None:
    assert torch.ones(2).type() == "torch.FloatTensor"


@pytest.mark.processes
@pytest.mark.skipif(torch.cuda.is_available(), reason="this host has CUDA")
def test_on_a_cpu_host_the_calls_that_name_cuda_reach_the_cpu() -> None:
    run(_on_a_cpu_host, 1)


@pytest.mark.processes
def test_on_a_cuda_host_nothing_is_changed() -> None:
    run(_on_a_cuda_host, 1)
