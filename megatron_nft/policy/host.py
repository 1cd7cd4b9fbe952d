"""What a host without CUDA needs so that Megatron-Core and vLLM run on it, and nothing else.

Megatron-Core names "cuda" in many factory calls. On a machine that has no CUDA device,
`prepare()` answers those calls with the CPU; where a CUDA device exists it does nothing at all.
"""

import contextlib
import os
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_mode: TorchFunctionMode | None = None


def has_cuda() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device that this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def backend() -> str:
    """The collective backend; on CUDA hosts CPU tensors go over gloo."""
    return "cpu:gloo,cuda:nccl" if has_cuda() else "gloo"


def prepare() -> None:
    """Make a CPU host usable by Megatron-Core and vLLM; on a CUDA host, do nothing."""
    global _mode
    if has_cuda() or _mode is not None:
        return
    _disarm_cuda_calls()
    _share_cpu_generator()
    _report_writes_in_process()
    _count_tokens_in_numbers()
    _mode = _CpuForCuda()
    _mode.__enter__()  # for the life of the process


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """Leave the CPU accommodations of tensor calls aside: vLLM's CPU build needs none of them."""
    if _mode is None:
        yield
        return
    _mode.__exit__(None, None, None)
    try:
        yield
    finally:
        _mode.__enter__()


def vllm_environment(kv_cache_gib: int) -> Mapping[str, str]:
    """vLLM's own switches: in-process engine always, and what its CPU build asks for."""
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if not has_cuda():
        environment |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        }
    return environment


def vllm_options(max_tokens: int) -> Mapping[str, Any]:
    """Engine arguments that vLLM's CPU build needs.

    When a prompt is prefilled in parts, vLLM rewinds the request's own random generator, and a CPU
    generator cannot be rewound. So prompts are prefilled whole.
    """
    if has_cuda():
        return {}
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(max_tokens, 8192)}


def server_environment(kv_cache_gib: int, num_processes: int) -> Mapping[str, str]:
    """The same for a vLLM server, with its engine in another process.

    On a CPU host it has its share of the cores, among `num_processes`.
    """
    environment = dict(vllm_environment(kv_cache_gib))
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    if not has_cuda():
        num_threads = len(os.sched_getaffinity(0)) // num_processes
        environment["OMP_NUM_THREADS"] = str(max(1, num_threads))
    return environment


def server_flags(max_tokens: int) -> Sequence[str]:
    """vllm_options in a server's words; a CPU host compiles nothing either."""
    if has_cuda():
        return []
    batched = str(vllm_options(max_tokens)["max_num_batched_tokens"])
    return ["--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", batched]


def sleep_options() -> Mapping[str, Any]:
    """Arguments of an engine that sleeps.

    vLLM's CPU build takes none: it goes through the same states, and gives no memory back.
    """
    return {"enable_sleep_mode": True} if has_cuda() else {}


def memory_in_use() -> int:
    """Bytes of this process's device, by whomever; on a CPU host, of memory by this process."""
    if has_cuda():
        free, total = torch.cuda.mem_get_info()
        return total - free
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fp8_rollout_trouble() -> str | None:
    """Why vLLM cannot compute with FP8 weights on this host; None where it can.

    Its CPU build multiplies by torch's own product, which every CPU has.
    """
    if has_cuda() and torch.cuda.get_device_capability() < (8, 9):
        major, minor = torch.cuda.get_device_capability()
        return f"needs a GPU of compute capability 8.9 or later, and this one has {major}.{minor}"
    return None


def repack_tied_head(model: torch.nn.Module) -> None:
    """Give a vLLM model on a CPU host its new output head after a reload.

    vLLM's CPU build multiplies by a packed copy of the head. A reload packs anew what it loads,
    but a head that is tied to the embedding is not loaded: its copy would stay the old one.
    """
    head = getattr(model, "lm_head", None)
    embedding = getattr(getattr(model, "model", None), "embed_tokens", None)
    if not has_cuda() and head is not None and head.weight is getattr(embedding, "weight", None):
        head.quant_method.process_weights_after_loading(head)


def pack_experts_anew(model: torch.nn.Module) -> None:
    """Make a vLLM model on a CPU host pack its experts at the next reload as it did at the first.

    vLLM's CPU build packs (and pads) experts when it sets their kernel up, which a reload does not
    do again: the kernel would read the new numbers in the wrong order, silently.
    """
    for module in () if has_cuda() else model.modules():
        method = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def num_local_processes() -> int:
    """Training processes of this machine, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def limit_threads(num_processes: int) -> None:
    """Share the cores among processes of a CPU host; oversubscribed threads thrash."""
    if not has_cuda():
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_processes))


class _CpuForCuda(TorchFunctionMode):
    """Turn `device="cuda"` into the CPU and let tensors pass the checks for CUDA types."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and any(_names_cuda(a) for a in args[1:]):
            args = tuple(torch.device("cpu") if _names_cuda(a) else a for a in args)
        return func(*args, **kwargs)


def _names_cuda(value: object) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.split(":")[0] == "cuda"


class _NoStream:
    """Stands for a stream or an event where everything is synchronous already."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...
    def wait_stream(self, stream: object) -> None: ...
    def wait_event(self, event: object) -> None: ...
    def record(self, stream: object = None) -> None: ...
    def record_event(self) -> "_NoStream":
        return self

    def wait(self, stream: object = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


def _disarm_cuda_calls() -> None:
    stream = _NoStream()
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda *_args, **_kwargs: None
    torch.cuda.current_stream = lambda *_args, **_kwargs: stream
    torch.cuda.stream = lambda *_args, **_kwargs: contextlib.nullcontext()
    torch.cuda.Stream = _NoStream
    torch.cuda.Event = _NoStream


def _share_cpu_generator() -> None:
    """Let Megatron's tracked random states be those of the CPU generator."""
    from megatron.core.tensor_parallel import random

    torch.cuda.get_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)


def _count_tokens_in_numbers() -> None:
    """Give Megatron's expert dispatch its counts as numbers, which torch's all-to-all wants.

    On a GPU host they become that when they are moved to the CPU, where they are here already.
    """
    from megatron.core.transformer.moe import token_dispatcher

    move = token_dispatcher.maybe_move_tensor_to_cpu

    def counts(tensor: Any, as_numpy: bool = False, **kwargs: Any) -> Any:
        is_counts = as_numpy and torch.is_tensor(tensor)
        return tensor.numpy() if is_counts else move(tensor, as_numpy, **kwargs)

    token_dispatcher.maybe_move_tensor_to_cpu = counts


def _report_writes_in_process() -> None:
    """Spare the first save the seconds that Megatron's manager process takes to import torch.

    Its checkpoint writer reports through a queue of that process, for writers that are processes
    themselves. A synchronous save writes in threads, and a queue of this process will do.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()
