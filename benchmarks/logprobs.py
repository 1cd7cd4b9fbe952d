"""Time and peak memory from hidden states to the gradients of a loss of log-probabilities.

    .venv/bin/python benchmarks/logprobs.py                      # float32 on a CPU, bf16 on CUDA
    .venv/bin/python benchmarks/logprobs.py --tokens 1024 --hidden 3584 --dtype bfloat16

`megatron_nft.policy.logprobs` against log_softmax, Megatron-Core's cross-entropy, the three matmuls
that nobody can do without and, on CUDA and where installed, the fused losses of Liger and torch (of
a sum of unweighted losses) and of Apple. Every method adds the gradient of the head to a float32
main_grad, as under Megatron's DistributedDataParallel. The methods take turns; times are medians,
ratios medians of the ratios within a turn. A CPU's seconds are those of all its threads together:
processor time does not see who else is on the machine. Peak memory is what a call needs beyond
what it is given: hidden states, head and main_grad. Needs torch ≥ 2.11 and megatron-core alone.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from megatron_nft.policy import host, logprobs

REFERENCE = "log_softmax + gather"
OURS = "ours, three matmuls"
FLOOR = "three matmuls alone"
# The goals: a CPU's time in terms of the reference, a GPU's of the floor; memory of the reference.
MAX_CPU_TIME, MAX_CUDA_TIME, MAX_MEMORY = 1.25, 1.1, 0.1


@dataclass(frozen=True)
class Inputs:
    """A micro-batch's hidden states and the head; the loss is the sum of factors · logp."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H], with main_grad
    targets: Tensor  # int64 [T]
    factors: Tensor  # float32 [T]


@dataclass(frozen=True)
class Measurement:
    """Forward and backward, or forward alone, of one method; None where memory ran out."""

    seconds: list[float]
    peak_mib: float


Method = Callable[[Inputs], Tensor]  # to logp [T], or to another tensor whose sum is the loss


def promised(x: Inputs) -> Tensor:
    return _ours(x, lambda _, rows: x.factors[rows])


def unfused(x: Inputs) -> Tensor:
    """By tensor operations, as on a CPU; the gradients are made here too."""
    has_kernels, logprobs._has_kernels = logprobs._has_kernels, lambda _: False
    try:
        return promised(x)
    finally:
        logprobs._has_kernels = has_kernels


def recomputed(x: Inputs) -> Tensor:
    return _ours(x, None)


def _ours(x: Inputs, gradient: logprobs.Gradient | None) -> Tensor:
    """As policy/step.py calls it: with the entropy where it trains."""
    logp, _ = logprobs.token_logprobs(
        x.hidden,
        x.weight,
        x.targets,
        temperature=1.0,
        vocab_size=len(x.weight),
        with_entropy=torch.is_grad_enabled(),
        gradient=gradient,
    )
    return logp * x.factors


def log_softmax(x: Inputs) -> Tensor:
    all_logp = (x.hidden @ x.weight.t()).float().log_softmax(dim=-1)
    return all_logp.gather(1, x.targets[:, None])[:, 0] * x.factors


def megatron(x: Inputs) -> Tensor:
    """On logits of its own, which it may overwrite."""
    logits = (x.hidden @ x.weight.t()).float()
    return -vocab_parallel_cross_entropy(logits[:, None], x.targets[:, None])[:, 0] * x.factors


class ThreeMatmuls(torch.autograd.Function):
    """No loss at all: as many logits at a time as ours stand for their own gradient."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        size = logprobs.CHUNK_CELLS // len(weight)
        size = min(len(hidden), size, logprobs.MAX_CHUNK_TOKENS)
        ctx.logits = hidden.new_empty(size, len(weight))
        for rows in hidden.split(size):
            torch.mm(rows, weight.t(), out=ctx.logits[: len(rows)])
        return hidden.new_zeros(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, _: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        size = len(ctx.logits)
        for rows, grads in zip(hidden.split(size), grad_hidden.split(size), strict=True):
            logprobs._addmm(weight.main_grad, ctx.logits[: len(rows)].t(), rows)
            torch.mm(ctx.logits[: len(rows)], weight, out=grads)
        return grad_hidden, None


def three_matmuls(x: Inputs) -> Tensor:
    return ThreeMatmuls.apply(x.hidden, x.weight)


def liger(x: Inputs) -> Tensor:
    functional = import_module("liger_kernel.transformers.functional")
    return functional.liger_fused_linear_cross_entropy(
        x.hidden, x.weight, x.targets, reduction="sum", accum_dtype=torch.float32
    )


def torch_fused(x: Inputs) -> Tensor:
    return torch.nn.functional.linear_cross_entropy(
        x.hidden,
        x.weight,
        x.targets,
        reduction="sum",
        options=torch.nn.LinearCrossEntropyOptions(),
    )


def apple(x: Inputs) -> Tensor:
    package = import_module("cut_cross_entropy")
    loss = package.linear_cross_entropy(x.hidden, x.weight, x.targets, reduction="none")
    return -loss.float() * x.factors


def methods() -> dict[str, Method]:
    found = {
        OURS: promised,
        "ours, logits made again": recomputed,
        REFERENCE: log_softmax,
        "Megatron's cross-entropy": megatron,
        FLOOR: three_matmuls,
    }
    if host.has_cuda():
        found["ours, without its kernels"] = unfused
    if host.has_cuda() and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["torch's fused loss, of a plain sum"] = torch_fused
    if host.has_cuda() and find_spec("liger_kernel"):
        found["Liger's fused loss, of a plain sum"] = liger
    if host.has_cuda() and find_spec("cut_cross_entropy"):
        found["Apple's cut cross-entropy"] = apple
    return found


def forward(method: Method, x: Inputs) -> None:
    with torch.no_grad():
        method(x)


def forward_and_backward(method: Method, x: Inputs) -> None:
    """Ends as DDP's hook does: a gradient that autograd made is added to main_grad."""
    method(x).sum().backward()
    if x.weight.grad is not None:
        x.weight.main_grad.add_(x.weight.grad)
    x.hidden.grad = x.weight.grad = None


Run = Callable[[Method, Inputs], None]
RUNS: tuple[Run, ...] = (forward_and_backward, forward)


def peak_mib(call: Callable[[], None]) -> float:
    """Memory that the call needs at its peak beyond what is taken before, in MiB."""
    if host.has_cuda():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak restarts at what is resident
    before = _status_kib("VmRSS")
    call()
    return (_status_kib("VmHWM") - before) / 2**10


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def seconds(call: Callable[[], None]) -> float:
    if not host.has_cuda():
        start = time.process_time()
        call()
        return time.process_time() - start
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


Results = dict[tuple[str, Run], Measurement | None]


def measure(x: Inputs, repeats: int) -> Results:
    """By method and run; a turn that is not timed warms up and measures memory."""
    found: Results = {}
    for turn in range(repeats + 1):
        for run, (name, method) in product(RUNS, methods().items()):
            if turn > 0 and found[name, run] is None:
                continue
            try:
                call = partial(run, method, x)
                if turn == 0:
                    if host.has_cuda():
                        call()  # compiles kernels, and has cuBLAS keep its workspace
                    found[name, run] = Measurement([], peak_mib(call))
                else:
                    found[name, run].seconds.append(seconds(call))
            except torch.OutOfMemoryError:
                found[name, run] = x.hidden.grad = x.weight.grad = None
    return found


def make_inputs(num_tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype) -> Inputs:
    """As of a trained model: logits of standard deviation one or so."""
    torch.manual_seed(0)
    device = host.device()
    hidden = torch.randn(num_tokens, hidden_size, device=device, dtype=dtype)
    weight = torch.randn(vocab_size, hidden_size, device=device, dtype=dtype)
    weight.div_(hidden_size**0.5).requires_grad_()
    # written to, since zeros of the allocator's are no memory yet
    weight.main_grad = torch.empty(weight.shape, device=device).zero_()
    targets = torch.randint(vocab_size, (num_tokens,), device=device)
    factors = torch.randn(num_tokens, device=device)
    return Inputs(hidden.requires_grad_(), weight, targets, factors)


def print_table(found: Results) -> None:
    print("| | forward + backward | × reference | × matmuls | peak MiB | ÷ reference | ", end="")
    print("forward alone | × reference | peak MiB |")
    print("|---|" + "---:|" * 8)
    for name in methods():
        training, scoring = (found[name, run] for run in RUNS)
        cells = [name, *_cells(found, training, forward_and_backward, [REFERENCE, FLOOR])]
        cells += _cells(found, scoring, forward, [REFERENCE])[:3]
        print("| " + " | ".join(cells) + " |", flush=True)


def _cells(
    found: Results,
    own: Measurement | None,
    run: Run,
    references: list[str],
) -> list[str]:
    """Seconds, the ratios of time, the peak and its ratio to the reference's."""
    if own is None:
        return ["out of memory"] + ["" for _ in range(len(references) + 2)]
    ratios = [_format(time_ratio(own, found[name, run])) for name in references]
    time_s = f"{statistics.median(own.seconds):.3g} s"
    memory = _format(memory_ratio(own, found[REFERENCE, run]))
    return [time_s, *ratios, f"{own.peak_mib:,.0f}", memory]


def _format(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def time_ratio(a: Measurement | None, b: Measurement | None) -> float | None:
    if a is None or b is None:
        return None
    return statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True))


def memory_ratio(a: Measurement | None, b: Measurement | None) -> float | None:
    return None if a is None or b is None else a.peak_mib / b.peak_mib


def print_goals(found: Results) -> None:
    ours, reference, floor = (
        found[name, forward_and_backward] for name in (OURS, REFERENCE, FLOOR)
    )
    if host.has_cuda():
        time = FLOOR, time_ratio(ours, floor), MAX_CUDA_TIME
    else:
        time = REFERENCE, time_ratio(ours, reference), MAX_CPU_TIME
    memory = REFERENCE, memory_ratio(ours, reference), MAX_MEMORY
    for what, (other, ratio, most) in (("time", time), ("peak memory", memory)):
        verdict = "nothing to compare with" if ratio is None else f"is {ratio:.3f}"
        met = "" if ratio is None else (": met" if ratio <= most else ": NOT MET")
        print(f"Goal: {what} of {OURS} at most {most} × {other}; {verdict}{met}")


def main() -> None:
    on_cuda = host.has_cuda()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    tokens = [8192, 16384, 32768, 65536] if on_cuda else [1024, 2048]
    parser.add_argument("--tokens", type=int, nargs="+", default=tokens)
    parser.add_argument("--hidden", type=int, default=3584 if on_cuda else 896)
    parser.add_argument("--vocabulary", type=int, default=152_064)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="bfloat16" if on_cuda else "float32"
    )
    parser.add_argument("--repeats", type=int, default=10 if on_cuda else 3)
    parser.add_argument("--chunk-cells", type=int, default=logprobs.CHUNK_CELLS)
    args = parser.parse_args()
    logprobs.CHUNK_CELLS = args.chunk_cells

    dist.init_process_group(host.backend(), store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    device = torch.cuda.get_device_name() if on_cuda else f"CPU, {torch.get_num_threads()} threads"
    for num_tokens in args.tokens:
        print(f"\n{num_tokens} tokens × {args.hidden} × {args.vocabulary} {args.dtype}; ", end="")
        print(f"{device}, torch {torch.__version__}, {args.repeats} turns\n", flush=True)
        dtype = getattr(torch, args.dtype)
        x = make_inputs(num_tokens, args.hidden, args.vocabulary, dtype)
        found = measure(x, args.repeats)
        print_table(found)
        print()
        print_goals(found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
