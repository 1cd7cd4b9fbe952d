"""Speed of an optimizer step and of the old-log-probability pass, and where the time goes.

    .venv/bin/python benchmarks/policy_step.py --models 7B --tokens 16384 --recompute none selective
    .venv/bin/torchrun --nproc-per-node 2 benchmarks/policy_step.py --models toy --tensor 2

Layer stacks of Qwen2.5's shapes with embedding and head, random weights, and as many layers as fit
into the memory; random sequences of log-normal length fill the micro-batches.

step          Policy.update, all of it; old logp: Policy.logp
TFLOP         the model's, by megatron_nft/policy/flops.py: a step is three forward passes, the head
              counts for response tokens alone, and nothing counts twice that is computed again
MFU           TFLOP/s over the rate of a large matrix product in --dtype, measured in this run
planned GiB   what `megatron-nft plan` says that torch allocates in a step on a GPU
× products    the time over that of the products with all weights, back to back, attention left out

Figures are per device and medians. Parts are the first rank's and exclude each other: in a step the
head's forward makes its gradients, backward has what is computed again and all waiting of a
pipeline, the rest deals, clears gradients and gathers what was measured. On CUDA they are the
device's time between events, idle time included. Needs torch ≥ 2.11 and megatron-core alone.
"""

import argparse
import gc
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import pairwise, product, starmap
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from shapes import SHAPES, fill, hf_config, start, workload
from tables import markdown

from megatron_nft.config import Config, ParallelConfig
from megatron_nft.plan.cards import CARDS
from megatron_nft.plan.memory import GIB, Memory, memory_of
from megatron_nft.plan.parameters import Held
from megatron_nft.policy import host, packing, parallel
from megatron_nft.policy.flops import forward_flops, layer_matmul_parameters
from megatron_nft.policy.logprobs import CHUNK_CELLS
from megatron_nft.policy.optimizer import add_up_gradients
from megatron_nft.policy.step import Policy

STEP, OLD_LOGP = "step", "old logp"
GOALS = (("torch", STEP, 0.50), ("te", STEP, 0.55), ("any", OLD_LOGP, 0.60))  # MFU of 7B
PARTS = "packing", "layers", "head", "objective", "backward", "reduction", "optimizer", "rest"
NAMES = "kind", "FP8", "recompute", "tokens", "pass"
FIGURES = ["layers", "micro-batches", "tokens/s", "TFLOP", "TFLOP/s", "MFU", "of --peak"]
FIGURES += ["× products", "peak GiB", "planned GiB", "s"]
WARM_UP = 2  # turns


@dataclass(frozen=True)
class Case:
    model: str
    kind: str  # of layers: te | torch
    fp8: str  # off, or a recipe
    recompute: str
    tokens: int  # a micro-batch

    def config(self, args: argparse.Namespace) -> Config:
        base = Config(parallel=args.layout)
        layers = "torch" if self.kind == "torch" else "transformer_engine"
        if self.fp8 != "off":
            format = "hybrid" if self.fp8 in ("tensorwise", "delayed") else "e4m3"
            base = replace(base, fp8=replace(base.fp8, format=format, recipe=self.fp8))
        return replace(
            base,
            model=replace(base.model, dtype=args.dtype, layers=layers),
            memory=replace(base.memory, recompute=self.recompute),
            optimizer=replace(base.optimizer, tokens_per_microbatch=self.tokens),
            data=replace(base.data, max_prompt_tokens=1),  # longest: what a row has room for
            rollout=replace(base.rollout, max_response_tokens=self.tokens - 1),
        )


@dataclass
class Measured:
    """One pass of a case, per device."""

    what: str
    num_layers: int
    num_micro_batches: int
    num_tokens: float
    tflop: float
    floor_s: float  # of the products alone
    planned_gib: float | None
    seconds: float
    peak_gib: float
    parts: dict[str, float]  # seconds


def timed(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: "TimedPolicy", *args: Any, **kwargs: Any) -> Any:
        outer = self.part
        self.stamp(part)
        with torch.profiler.record_function(part):
            found = method(self, *args, **kwargs)
        self.stamp(outer)
        return found

    return call


class TimedPolicy(Policy):
    def __init__(self, config: Config, hf: SimpleNamespace) -> None:
        self.part, self.stamps = "", []
        super().__init__(config, hf, fill)
        self.chunks[0].config.finalize_model_grads_func = self._reduce

    update, logp = timed("rest", Policy.update), timed("rest", Policy.logp)
    _run_schedule = timed("backward", Policy._run_schedule)  # all of it that is no other part
    _pack = timed("packing", lambda _, data: next(data))
    _run_layers = timed("layers", Policy._forward)
    _logprobs = timed("head", Policy._logprobs)
    _loss = timed("objective", Policy._loss)
    _reduce = timed("reduction", lambda _, *args, **kwargs: add_up_gradients(*args, **kwargs))
    _step = timed("optimizer", Policy._step)

    def _forward(
        self, temperature: float, data: Iterator[packing.MicroBatch], model: torch.nn.Module
    ) -> Any:
        return self._run_layers(temperature, iter([self._pack(data)]), model)

    def stamp(self, part: str) -> None:
        """From now on it is this part's time, the device's on CUDA."""
        self.part, now = part, time.perf_counter()
        if host.has_cuda():
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.stamps.append((part, now))

    def read(self) -> dict[str, float]:
        """Seconds of every part since the last reading, without the parts within it."""
        found = dict.fromkeys(["", *PARTS], 0.0)
        for (part, begin), (_, end) in pairwise(self.stamps):
            found[part] += begin.elapsed_time(end) / 1e3 if host.has_cuda() else end - begin
        self.stamps = []
        return found


def layers_that_fit(case: Case, config: Config) -> int:
    """Layers of all pipeline stages, by the plan; FP8 has copies of the weights besides."""
    hf, ranks = hf_config(case.model), config.parallel
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / dist.get_world_size() / 2
    if host.has_cuda():
        memory = 0.8 * torch.cuda.mem_get_info()[1]
    num_tables = 1 if hf.tie_word_embeddings or ranks.pipeline > 1 else 2
    tables = num_tables * hf.hidden_size * hf.vocab_size
    copies = 2 if case.fp8 != "off" else 0  # bytes a parameter

    def needed(held: int, stage: int) -> float:
        planned = planned_memory(hf, config, held, stage)
        # torch's AdamW makes roots of second moments, once activations are gone
        roots = max(0, 4 * held - planned.activations - planned.head)
        return planned.allocated + roots + copies * held

    for number in range(hf.num_hidden_layers // ranks.pipeline, 1, -1):
        hf.num_hidden_layers = number * ranks.pipeline
        held = (number * layer_matmul_parameters(hf) + tables) // ranks.tensor
        if max(needed(held, stage) for stage in range(ranks.pipeline)) <= memory:
            return hf.num_hidden_layers
    return ranks.pipeline


def planned_memory(hf: SimpleNamespace, config: Config, num_parameters: int, stage: int) -> Memory:
    """Of a rank of a pipeline stage in a step, on any card."""
    held = Held(stage, num_parameters, expert=0)
    return memory_of(hf, config, held, dist.get_world_size(), CARDS["h200"])


def seconds(call: Callable[[], Any]) -> float:
    """Of one call, which all ranks begin together."""
    dist.barrier()
    torch.cuda.synchronize()  # nothing on a CPU host, by host.prepare
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def matmul_rate(dtype: torch.dtype) -> float:
    """TFLOP/s of a large square product, the best of several."""
    size = 8192 if host.has_cuda() else 1024
    a, b = (torch.randn(size, size, device=host.device(), dtype=dtype) for _ in range(2))
    return 2e-12 * size**3 / min(seconds(lambda: a @ b) for _ in range(20))


def floor_seconds(
    hf: SimpleNamespace, config: Config, rows: Sequence[tuple[int, int]], what: str
) -> float:
    """Of the products with the weights, on a rank that has its share of layers and the head."""
    ranks, hidden = config.parallel.tensor, hf.hidden_size
    attended = hidden // ranks
    qkv = attended + 2 * attended * hf.num_key_value_heads // hf.num_attention_heads
    inner, head = hf.intermediate_size // ranks, (hidden, hf.vocab_size // ranks)
    layers = [(hidden, qkv), (attended, hidden), (hidden, 2 * inner), (inner, hidden)]
    layers *= hf.num_hidden_layers // config.parallel.pipeline
    chunk = max(1, CHUNK_CELLS // head[1])  # of tokens
    calls = [(num, shape) for num, _ in rows for shape in layers]
    calls += [(min(chunk, r - i), head) for _, r in rows for i in range(0, r, chunk)]
    make = partial(torch.randn, device=host.device(), dtype=getattr(torch, config.model.dtype))
    weights = {shape: make(shape) for _, shape in calls}
    longest = {width: num for num, shape in sorted(calls) for width in shape}
    values = {width: make(num, width) for width, num in longest.items()}

    def multiply() -> None:
        for num, shape in calls:
            x, y, weight = *(values[width][:num] for width in shape), weights[shape]
            _ = x @ weight
            if what == STEP:
                _ = y @ weight.t(), x.t() @ y

    multiply()
    return float(np.median([seconds(multiply) for _ in range(3)]))


def measure(case: Case, args: argparse.Namespace) -> list[Measured]:
    config, hf, num_devices = case.config(args), hf_config(case.model), dist.get_world_size()
    hf.num_hidden_layers = args.layers or layers_that_fit(case, config)
    say(f"{case}: {hf.num_hidden_layers} layers", file=sys.stderr)
    num_ranks = parallel_state.get_data_parallel_world_size()
    sequences = workload(hf.vocab_size, case.tokens, args.mean, num_ranks, args.micro_batches)
    lengths, num_predicted = zip(*((s.num_tokens, len(s.response)) for s in sequences), strict=True)
    policy = TimedPolicy(config, hf)
    bins = policy._bins(sequences)[parallel_state.get_data_parallel_rank()]
    rows = [(sum(lengths[i] for i in b), sum(num_predicted[i] for i in b)) for b in bins]
    floors = {what: floor_seconds(hf, config, rows, what) for what in (STEP, OLD_LOGP)}
    logps = policy.logp(sequences)
    sequences = [replace(s, old_logp=logp) for s, logp in zip(sequences, logps, strict=True)]
    step, old_logp = partial(policy.update, sequences, 1e-6), partial(policy.logp, sequences)
    tflop = 1e-12 * forward_flops(hf, lengths, sum(num_predicted)) / num_devices
    counts = hf.num_hidden_layers, len(rows), sum(lengths) / num_devices
    num_parameters = sum(p.numel() for chunk in policy.chunks for p in chunk.parameters())
    stage = parallel_state.get_pipeline_model_parallel_rank()
    planned = planned_memory(hf, config, num_parameters, stage).allocated / GIB
    found = []
    for what, call, passes, gib in (STEP, step, 3, planned), (OLD_LOGP, old_logp, 1, None):
        timing = time_pass(policy, call, args.repeats)
        found.append(Measured(what, *counts, passes * tflop, floors[what], gib, *timing))
    if args.profile:
        profile(step, args.profile)
    return found


def time_pass(
    policy: TimedPolicy, call: Callable[[], Any], repeats: int
) -> tuple[float, float, dict[str, float]]:
    """Seconds, peak memory and seconds of the parts."""
    if host.has_cuda():
        torch.cuda.reset_peak_memory_stats()
    turns = [(seconds(call), policy.read()) for _ in range(WARM_UP + repeats)][WARM_UP:]
    parts = {part: float(np.median([found[part] for _, found in turns])) for part in PARTS}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10  # of the process until now
    if host.has_cuda():
        peak = torch.cuda.max_memory_allocated()
    return float(np.median([total for total, _ in turns])), peak / GIB, parts


def profile(call: Callable[[], Any], path: str) -> None:
    """One more turn's trace, for chrome://tracing, and what took the device longest."""
    with torch.profiler.profile() as profiler:
        seconds(call)
    if dist.get_rank() == 0:
        profiler.export_chrome_trace(path)
        key = f"self_{'cuda' if host.has_cuda() else 'cpu'}_time_total"
        print(profiler.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=60))


def say(*text: str, **options: Any) -> None:
    if dist.get_rank() == 0:
        print(*text, flush=True, **options)


def report(found: dict[Case, list[Measured]], rate: float, peak: float | None) -> str:
    figures, parts = [], []
    for case, passes in found.items():
        name = astuple(case)[1:]
        if not passes:
            figures.append([*name, "out of memory", *[""] * len(FIGURES)])
        for m in passes:
            speed, whole = m.tflop / m.seconds, sum(m.parts.values())
            cells = [m.num_layers, m.num_micro_batches, f"{m.num_tokens / m.seconds:,.0f}"]
            cells += [f"{m.tflop:.5g}", f"{speed:.4g}", f"{speed / rate:.1%}"]
            cells += [f"{speed / peak:.1%}" if peak else "", f"{m.seconds / m.floor_s:.2f}"]
            cells += [f"{m.peak_gib:.2f}", f"{m.planned_gib:.2f}" if m.planned_gib else ""]
            figures.append([*name, m.what, *cells, f"{m.seconds:.4g}"])
            shares = (f"{s:.3g} s, {s / whole:.1%}" for s in m.parts.values())
            parts.append([*name, m.what, *shares])
    tables = markdown([*NAMES, *FIGURES], figures), markdown([*NAMES, *PARTS], parts)
    return "\n\n".join(tables) + "\n"


def goals(found: dict[Case, list[Measured]], rate: float) -> Iterator[str]:
    for kind, what, least in GOALS:
        of_kind = [found[c] for c in found if c.model == "7B" and kind in (c.kind, "any")]
        mfus = [m.tflop / m.seconds / rate for passes in of_kind for m in passes if m.what == what]
        met = f"{max(mfus):.1%}, {'met' if max(mfus) >= least else 'NOT met'}" if mfus else "–"
        yield f"- MFU of 7B, {kind} layers, {what}, ≥ {least:.0%}: {met}"


def arguments() -> argparse.Namespace:
    on_cuda = host.has_cuda()
    has_te = on_cuda and find_spec("transformer_engine") is not None
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    models, tokens = (["0.5B", "7B", "32B"], [4096, 16_384]) if on_cuda else (["toy"], [512])
    add("--models", nargs="+", choices=SHAPES, default=models)
    add("--layers", type=int, help="layers of every model; default: as many as fit into memory")
    add("--layers-kind", choices=["te", "torch", "both"], default="both" if has_te else "torch")
    recipes = ["off", "tensorwise", "delayed", "blockwise", "mxfp8"]
    add("--fp8", nargs="+", choices=recipes, default=["off"], help="recipes, for te layers")
    add("--recompute", nargs="+", choices=["none", "selective", "full"], default=["none"])
    add("--tokens", type=int, nargs="+", default=tokens, help="a micro-batch")
    add("--micro-batches", type=int, default=4, help="a step, on each data-parallel rank")
    add("--mean", type=float, default=1000 if on_cuda else 100, help="tokens of a sequence")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16" if on_cuda else "float32")
    add("--tensor", type=int, default=1, help="ranks of torchrun's; with sequence parallelism")
    add("--pipeline", type=int, default=1, help="ranks of torchrun's")
    add("--repeats", type=int, default=5)
    add("--peak", type=float, help="TFLOP/s of the device by its data sheet, for another MFU")
    add("--profile", metavar="FILE", help="write a trace of the last case's step; print kernels")
    args = parser.parse_args()
    args.layout = ParallelConfig(args.tensor, args.pipeline, sequence=args.tensor > 1)
    args.kinds = ["te", "torch"] if args.layers_kind == "both" else [args.layers_kind]
    if "te" in args.kinds and not has_te:
        parser.error("--layers-kind te needs a GPU and the package transformer_engine")
    if set(args.fp8) - {"off"} and ("te" not in args.kinds or args.dtype != "bfloat16"):
        parser.error("--fp8 needs --layers-kind te and --dtype bfloat16")
    return args


def main() -> None:
    args = arguments()
    start(args.layout)
    rate, on_cuda = matmul_rate(getattr(torch, args.dtype)), host.has_cuda()
    device = torch.cuda.get_device_name() if on_cuda else f"CPU, {torch.get_num_threads()} threads"
    say(f"{dist.get_world_size()} × {device}, torch {torch.__version__}: ", end="")
    say(f"{rate:.4g} TFLOP/s in a large {args.dtype} product")
    found = {}
    for model in args.models:
        options = args.kinds, args.fp8, args.recompute, args.tokens
        for case in starmap(Case, product([model], *options)):
            if case.kind == "torch" and case.fp8 != "off":
                continue  # only Transformer Engine's layers have FP8
            try:
                found[case] = measure(case, args)
            except torch.cuda.OutOfMemoryError:
                if dist.get_world_size() > 1:
                    raise  # or the other ranks would wait for this one
                found[case] = []
            gc.collect()
            torch.cuda.empty_cache()
        of_model = {case: passes for case, passes in found.items() if case.model == model}
        say(f"\n## {model}\n\n{report(of_model, rate, args.peak)}")
    say("\n".join(goals(found, rate)) if on_cuda else "Goals are for a GPU.")
    parallel.finalize()


if __name__ == "__main__":
    main()
