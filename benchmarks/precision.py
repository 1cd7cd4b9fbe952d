"""What numbers of fewer bits do to log-probabilities, to gradients and to what is learnt.

    .venv/bin/python benchmarks/precision.py --shape 7B --layers 4       # a GPU
    .venv/bin/python benchmarks/precision.py --shape toy                 # a CPU host
    .venv/bin/python benchmarks/precision.py --parts learning --kinds bfloat16 tensorwise

errors     one random model (--model DIR: a real one) and the same sequences in every kind: |Δlogp|
           of tokens, and the gradient of NFT's loss, on-policy, all parameters as one vector: its
           distance from the other's relative to that, its cosine with it, and the distance of the
           worst parameter (one with hardly any norm counts with 1% of all's)
imitation  the demo's cold start for --steps steps, from the same random weights: the mean loss of
           the last tenth. Needs no engine
learning   the demo's second half for --steps steps, all from one cold start: held-out accuracy
           (avg@8 of 128 sums) before, at its best and at the end, and what trainer and engine
           differ by

Kinds: float32 and bfloat16 are our layers of torch; te is Transformer Engine's in bf16, tensorwise
and blockwise its FP8; fp8-rollouts trains as bfloat16 does and samples from an engine in FP8. By
default all that this host can run.
"""

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import mean

os.environ.setdefault("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")  # before TE is imported
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import torch
from policies import policy_of
from shapes import SHAPES, start, workload
from strangers import write_model
from tables import head, row

from checkpoints_conversion.live import named_parameters
from checkpoints_conversion.stream import stream_of
from megatron_nft import demo, recipe
from megatron_nft.config import Config, ParallelConfig
from megatron_nft.metrics import Record, read_metrics
from megatron_nft.policy import host, parallel
from megatron_nft.processes import end_with_parent

BF16, TE = ["model.dtype=bfloat16"], ["model.layers=transformer_engine"]
KINDS = {
    "float32": ["model.dtype=float32", "model.layers=torch"],
    "bfloat16": [*BF16, "model.layers=torch"],
    "te": [*BF16, *TE],
    "tensorwise": [*BF16, *TE, "fp8.format=hybrid", "fp8.recipe=tensorwise"],
    "blockwise": [*BF16, *TE, "fp8.format=e4m3", "fp8.recipe=blockwise"],
    "fp8-rollouts": [*BF16, "model.layers=torch", "rollout.quantization=fp8"],
}
# of a kind: memory that is too small, what Transformer Engine refuses, a step that is not finite
TROUBLES = (RuntimeError, ValueError, AssertionError, ImportError, FloatingPointError)
EXACT, BASE = "float32", "bfloat16"  # what errors are relative to
Gradient = dict[str, torch.Tensor]  # float32, by Hugging Face names


@dataclass(frozen=True)
class Measured:
    logp: np.ndarray  # float32, of all tokens
    gradient: Gradient


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as name:
        failed = []
        for part in args.parts:
            failed += PARTS[part](args, Path(name) / part)
            gc.collect()
            torch.cuda.empty_cache()  # for the runs of the next part
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


show = partial(print, flush=True)

# errors


def errors(args: argparse.Namespace, folder: Path) -> list[str]:
    path = args.model or random_model(args, folder)
    kinds = [kind for kind in dict.fromkeys((EXACT, BASE, *args.kinds)) if kind != "fp8-rollouts"]
    start(ParallelConfig())
    print(f"\n## Errors: {args.model or f'{args.shape}, random'}, {device()}\n")
    columns = "", "against", "mean |Δlogp|", "max", "gradient off by", "cosine", "worst parameter"
    show(head(columns))
    bases: dict[str, Measured] = {}
    failed = []
    for kind in kinds:
        try:
            own = measured(config_of(kind, path, args), args)
        except TROUBLES:
            traceback.print_exc()
            own = None
        gc.collect()  # the policy, before the next one comes
        torch.cuda.empty_cache()
        if own is None:
            show(row([kind, "", "failed"]))
            failed.append(kind)
            continue
        for name, base in bases.items():
            show(row([kind, name, *compared(own, base)]))
        if kind in (EXACT, BASE):
            bases[kind] = own
    parallel.finalize()
    return failed


def random_model(args: argparse.Namespace, folder: Path) -> Path:
    layers = args.layers or SHAPES[args.shape][2]
    return write_model(folder, args.shape, layers, None, torch.float32)


def config_of(kind: str, path: Path, args: argparse.Namespace) -> Config:
    overrides = [f"model.path={path}", "parallel.tensor=1"]
    config = recipe.load(demo.RECIPES / "demo.yaml", [*overrides, *KINDS[kind]])
    options = {"tokens_per_microbatch": args.tokens, "clip_norm": 1e30}  # gradients as they are
    return replace(config, optimizer=replace(config.optimizer, **options))


def measured(config: Config, args: argparse.Namespace) -> Measured:
    policy = policy_of(config)
    vocab_size = policy.hf_config.vocab_size
    sequences = workload(vocab_size, args.tokens, args.mean, 1, args.micro_batches)
    logps = policy.logp(sequences)
    policy.update(
        [replace(s, old_logp=logp) for s, logp in zip(sequences, logps, strict=True)], lr=0.0
    )
    gradients = {n: p.main_grad for n, p in named_parameters(policy.chunks).items()}
    streamed = stream_of(gradients, policy.hf_config)
    return Measured(np.concatenate(logps), {name: tensor.clone() for name, tensor in streamed})


def compared(own: Measured, other: Measured) -> list[str]:
    """|Δlogp|, mean and largest; the gradients' distance, cosine, and the worst parameter's."""
    off, sums = np.abs(own.logp - other.logp), _sums(own.gradient, other.gradient)
    dot, of_own, of_other, apart = sums.sum(0)
    each = (sums[:, 3] / sums[:, 2].clip(min=1e-4 * of_other)) ** 0.5
    distance, cosine = (apart / of_other) ** 0.5, dot / (of_own * of_other) ** 0.5
    found = [f"{off.mean():.2e}", f"{off.max():.2e}", f"{distance:.2e}", f"{cosine:.6f}"]
    return [*found, f"{each.max():.2e}"]


def _sums(a: Gradient, b: Gradient) -> np.ndarray:
    """Σab, Σa², Σb² and Σ(a − b)² of every parameter, float64 [N, 4]."""
    pairs = ((a[name].double(), other.double()) for name, other in b.items())
    rows = [
        torch.stack([(x * y).sum(), (x * x).sum(), (y * y).sum(), ((x - y) ** 2).sum()])
        for x, y in pairs
    ]
    return torch.stack(rows).cpu().numpy()


# imitation, learning


def imitation(args: argparse.Namespace, folder: Path) -> list[str]:
    print(f"\n## The demo's cold start, {args.steps} steps, {device()}\n")
    show(head(["", "seed", "first loss", "last loss", "gradient norm", "skipped", "s a step"]))

    def cells(kind: str, seed: int) -> list[str]:
        task = made(folder, seed)
        overrides = [f"rollouts={args.steps}", "evaluate.sets=[]", "evaluate.stop_at_accuracy=0"]
        overrides += [*KINDS[kind], f"model.path={task / 'model'}"]
        overrides += [f"data.train[0].path={task / 'data' / 'demonstrations.jsonl'}"]
        found = run("demo-cold-start.yaml", task / kind, overrides, seed, args)
        taken = [r for r in found if "loss" in r]  # steps that were not finite have none
        if not taken:
            raise RunError(f"no step of {len(found)} was finite")
        last = taken[-max(1, len(taken) // 10) :]
        figures = (
            taken[0]["loss"],
            mean(r["loss"] for r in last),
            mean(r["grad_norm"] for r in last),
        )
        skipped = str(found[-1]["steps_skipped"])
        return [*(f"{x:.4f}" for x in figures), skipped, f"{seconds(found):.3f}"]

    return rows(cells, [kind for kind in args.kinds if kind != "fp8-rollouts"], args.seeds)


def learning(args: argparse.Namespace, folder: Path) -> list[str]:
    print(f"\n## NFT on the demo's task, {device()}\n")
    columns = "", "seed", "steps", "skipped", "before", "best", "end", "mean |Δlogp|"
    show(head([*columns, "largest mean", "s a rollout"]))
    options = recipe.load(demo.RECIPES / "demo.yaml", [])
    per_rollout = options.rollout.questions // options.optimizer.questions_per_minibatch

    def cells(kind: str, seed: int) -> list[str]:
        task = made(folder, seed)
        overrides = [f"rollouts={-(-args.steps // per_rollout)}", "evaluate.stop_at_accuracy=0"]
        overrides += [*KINDS[kind], *paths(task, "train")]
        overrides += [f"model.path={cold_start(task, seed, args)}"]
        found = run("demo.yaml", task / kind, overrides, seed, args)
        last = found[-1]
        numbers = str(last["step"]), str(last["steps_skipped"])
        return [*numbers, *learnt(found), f"{seconds(found):.2f}"]

    return rows(cells, args.kinds, args.seeds)


class RunError(RuntimeError):
    """What the command said."""


def rows(
    cells: Callable[[str, int], list[str]], kinds: Sequence[str], seeds: Sequence[int]
) -> list[str]:
    """Print a row for each; who failed, whose neighbours' rows are printed all the same."""
    failed = []
    for seed, kind in product(seeds, kinds):
        try:
            show(row([kind, seed, *cells(kind, seed)]))
        except RunError as error:
            print(error, file=sys.stderr)
            show(row([kind, seed, "failed"]))
            failed.append(f"{kind}, seed {seed}")
    return failed


def learnt(found: Sequence[Record]) -> Iterator[str]:
    key = "eval/heldout/accuracy"
    accuracies = [r[key] for r in found if key in r]
    deltas = [r["logp_delta_mean"] for r in found if "logp_delta_mean" in r]
    yield from (f"{x:.1%}" for x in (accuracies[0], max(accuracies), accuracies[-1]))
    yield from (f"{x:.1e}" for x in (mean(deltas), max(deltas)))


def made(folder: Path, seed: int) -> Path:
    """The demo's task of this seed, and room for its runs."""
    demo.make_task(folder / str(seed), seed)
    return folder / str(seed)


def cold_start(task: Path, seed: int, args: argparse.Namespace) -> Path:
    """The model that every kind begins with, in float32."""
    out = task / "cold-start"
    if not (out / "hf").exists():
        overrides = [*paths(task, "demonstrations"), f"model.path={task / 'model'}"]
        overrides += KINDS[EXACT]
        run("demo-cold-start.yaml", out, overrides, seed, args)
    return out / "hf"


def paths(folder: Path, data: str) -> list[str]:
    return [
        f"data.train[0].path={folder / 'data' / f'{data}.jsonl'}",
        f"evaluate.sets[0].path={folder / 'data' / 'heldout.jsonl'}",
    ]


def run(
    name: str, out: Path, overrides: Sequence[str], seed: int, args: argparse.Namespace
) -> list[Record]:
    """A run's records."""
    overrides = [*overrides, f"run_dir={out}", f"seed={seed}", "parallel.tensor=1"]
    overrides += [f"parallel.num_processes={args.processes}", "logging.tensorboard=false"]
    overrides += ["checkpoint.every=0", "checkpoint.check_export=false"]
    command = [sys.executable, "-m", "megatron_nft", "train", str(demo.RECIPES / name), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=end_with_parent)
    if done.returncode:
        raise RunError(done.stdout + done.stderr)
    return read_metrics(out)


def seconds(found: Sequence[Record]) -> float:
    """Of a rollout, the median."""
    spent = [sum(v for k, v in r.items() if k.startswith("seconds/")) for r in found]
    return float(np.median([s for s in spent if s]))


# arguments


def device() -> str:
    name = torch.cuda.get_device_name() if host.has_cuda() else "CPU"
    return f"{name}, torch {torch.__version__}"


def kinds_here() -> list[str]:
    lacking: set[str] = set()
    if not (host.has_cuda() and find_spec("transformer_engine")):
        lacking |= {"te", "tensorwise", "blockwise"}
    if not (host.has_cuda() and find_spec("vllm")):
        lacking.add("fp8-rollouts")
    return [kind for kind in KINDS if kind not in lacking]


def arguments() -> argparse.Namespace:
    on_cuda = host.has_cuda()
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=["errors", "imitation"])
    add("--kinds", nargs="+", choices=KINDS, default=kinds_here())
    add("--shape", choices=SHAPES, default="7B" if on_cuda else "toy", help="of errors' model")
    add("--layers", type=int, default=4 if on_cuda else None, help="of errors' model")
    add("--model", type=Path, help="a Hugging Face directory, for errors")
    add("--tokens", type=int, default=8192 if on_cuda else 512, help="errors' micro-batches")
    add("--micro-batches", type=int, default=2, help="of errors")
    add("--mean", type=float, default=1000 if on_cuda else 100, help="tokens of a sequence")
    add("--steps", type=int, default=200, help="of imitation and learning")
    add("--seeds", type=int, nargs="+", default=[0], help="of imitation and learning: runs of each")
    processes = 1 if on_cuda else len(os.sched_getaffinity(0))
    add("--processes", type=int, default=processes, help="of imitation and learning")
    return parser.parse_args()


PARTS = {"errors": errors, "imitation": imitation, "learning": learning}

if __name__ == "__main__":
    main()
