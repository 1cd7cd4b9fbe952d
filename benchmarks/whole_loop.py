"""`megatron-nft train` with its engine beside the policy: where a rollout's time and memory go.

    .venv/bin/python benchmarks/whole_loop.py --models 0.5B 7B    # a GPU
    .venv/bin/python benchmarks/whole_loop.py --models toy        # a CPU host, a minute

One process, as a recipe runs it: vLLM samples answers to --questions questions, 16 each; they are
judged; the trainer's log-probabilities; optimizer steps of a quarter of the questions; the weights
in place into the engine, with both of their proofs. The models are random ones of Qwen2.5's shapes
whose answers end by chance (benchmarks/strangers.py), and right is what a coin says of an answer's
text: practically every group is mixed, and nothing is learnt.

seconds   medians of --rollouts, after one that warms up; memory: the engine's sleep, what is moved
          off the GPU and back; between: what no phase counts; planned: what `megatron-nft plan`
          says for --gpu and these lengths, where the engine's sleep is in "between"
memory    the most that was in use of the GPU at the end of a phase, what vLLM's sleep gave back,
          each time, and what is in use then (a CPU host's engine keeps its memory)
weights   bytes of the whole tensors over the time of the hand-over, in which the engine wakes,
          digests every byte on both sides and answers the probe, beside a copy on the device
|Δlogp|   between trainer and engine: of sampled tokens, and of the probe

Each rollout is told of as it comes, and after --limit-s the tables are of what is there. What
follows the last rollout, its checkpoint and its export, is cut off.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import yaml
from shapes import SHAPES, hf_config
from strangers import write_model, write_questions
from tables import markdown
from tqdm import tqdm

from checkpoints_conversion.hf_files import read_hf_config
from megatron_nft import recipe
from megatron_nft.metrics import FILE_NAME, GIB, Record
from megatron_nft.plan.cards import CARDS
from megatron_nft.plan.estimate import plan_for
from megatron_nft.plan.times import Times
from megatron_nft.plan.workload import workload_of
from megatron_nft.processes import end_with_parent

BENCHMARKS = Path(__file__).parent
GROUP, PROMPT = 16, 64  # answers to a question, its tokens
PHASES = {"sampling": "rollout", "old logp": "old_logp", "training": "update"}
PHASES |= {"weights": "weights", "memory": "memory"}
TOLD = "seconds/", "tokens_", "device_gib", "engine_gib", "logp_delta", "weights_gib"
WHOLE = "whole"  # seconds from a rollout's record to the next one's
ROOM = 0.8  # of a GPU, for what the plan counts: gaps, graphs and contexts are not in it
COPIED = 2**30  # bytes of the copy that the hand-over is compared with


def recipe_of(model: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    questions = write_questions(folder / "train.jsonl", 4 * args.questions, PROMPT)
    return {
        "run_dir": str(folder / "run"),
        "rollouts": args.rollouts + 2,  # the last one is not waited for
        "model": {"path": str(model), "dtype": args.dtype},
        "parallel": {"num_processes": 1},
        "memory": {"offload": args.offload, "recompute": args.recompute},
        "data": {
            "train": [{"path": str(questions), "rule": {"name": "coin:is_right"}}],
            "template": "raw",
            "max_prompt_tokens": PROMPT,
        },
        "rollout": {
            "questions": args.questions,
            "questions_asked": args.questions,
            "max_asks": 2,
            "answers": GROUP,
            "max_response_tokens": args.longest,
            "max_sequences": args.max_sequences,
            "memory_fraction": args.memory_fraction,
            "quantization": args.quantization,
        },
        "optimizer": {
            "questions_per_minibatch": args.questions // 4,
            "tokens_per_microbatch": args.micro_batch,
            "warmup_rollouts": 0,
        },
        "evaluate": {"every": 0},
        "checkpoint": {"every": 0},
        "logging": {"tensorboard": False},
    }


def layers_that_fit(shape: str, path: Path, args: argparse.Namespace) -> int:
    """All of the shape's, or on a GPU that the plan knows as many as it has memory for."""
    stranger, config = hf_config(shape), recipe.load(path, args.set)
    stranger.tie_word_embeddings = False
    while args.gpu and stranger.num_hidden_layers > 1:
        plan = plan_for(stranger, config, 1, CARDS[args.gpu], workload_of(config))
        if plan.engine_fits and plan.peak <= ROOM * plan.card.memory_gib * GIB:
            break
        stranger.num_hidden_layers -= 1
    return stranger.num_hidden_layers


class LoopError(RuntimeError):
    """What the run said."""


def measure(path: Path, log: Path, args: argparse.Namespace) -> tuple[list[Record], str]:
    """The rollouts' records, the one that warms up first, and what the run said.

    Raises:
        LoopError: it ended by itself, or no rollout was done in time.
    """
    command = [sys.executable, "-m", "megatron_nft", "train", str(path), *args.set]
    paths = [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    said = path.with_name("said")
    with said.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, preexec_fn=end_with_parent
        )
        try:
            found = list(_watched(process, log, args))
        finally:
            has_ended = process.poll() is not None
            _end(process)
    if has_ended or not found:
        raise LoopError(f"{said.read_text()[-8000:]}\nafter {len(found)} rollouts")
    return found, said.read_text()


def _watched(process: subprocess.Popen, log: Path, args: argparse.Namespace) -> Iterator[Record]:
    """Each rollout's record, with the time since the one before, as it comes."""
    begun = before = time.time()
    number = 0
    with tqdm(total=args.rollouts + 1, desc="rollouts", unit="rollout") as bar:
        while number <= args.rollouts and time.time() < begun + args.limit_s:
            has_ended = process.poll() is not None
            for record in _rollouts(log)[number : args.rollouts + 1]:
                now = log.stat().st_mtime  # when it came, if no other has come since
                record[WHOLE], before, number = now - before, now, number + 1
                bar.update()
                told = {k: v for k, v in record.items() if k.startswith(TOLD)}
                tqdm.write(f"rollout {number}: {json.dumps(told)}", file=sys.stderr)
                yield record
            if has_ended:
                return
            time.sleep(0.1)


def _rollouts(log: Path) -> list[Record]:
    """Each rollout's last record, which has its seconds."""
    if not log.exists():
        return []
    complete = log.read_text().split("\n")[:-1]
    return [r for r in map(json.loads, complete) if "seconds/rollout" in r]


def _end(process: subprocess.Popen) -> None:
    """With all that it started, which may have a GPU's memory."""
    started = []
    with suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
    process.kill()  # the others end with it: processes.end_with_parent
    process.wait()
    _, alive = psutil.wait_procs(started, timeout=60)
    for one in alive:
        one.kill()
    psutil.wait_procs(alive)


def elsewhere[T](function: Callable[..., T], *args: Any) -> T:
    """The function's result by a process that ends: this one has nothing on the GPU."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=end_with_parent) as pool:
        return pool.submit(function, *args).result()


def planned(config_path: Path, overrides: Sequence[str], gpu: str, found: list[Record]) -> Times:
    """What the plan says of such answers."""
    config = recipe.load(config_path, overrides)
    workload = workload_of(
        config,
        answer_tokens=typical(found, "response_length_mean"),
        prompt_tokens=PROMPT,
        mixed=typical(found, "groups_kept_fraction"),
    )
    model = read_hf_config(Path(config.model.path))
    return plan_for(model, config, 1, CARDS[gpu], workload).times


def copy_rate() -> float:
    """Bytes a second of a copy on the device, by its bytes once."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.empty(COPIED, dtype=torch.uint8, device=device).fill_(1)
    target, seconds = torch.empty_like(source).fill_(0), []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return COPIED / min(seconds)


def typical(found: Sequence[Record], key: str) -> float:
    return median(record[key] for record in found)


def seconds_table(name: str, found: list[Record], times: Times | None) -> str:
    spent = {phase: typical(found, f"seconds/{key}") for phase, key in PHASES.items()}
    spent["between"] = median(
        r[WHOLE] - sum(r[f"seconds/{key}"] for key in PHASES.values()) for r in found
    )
    rows = {name: (*spent.values(), typical(found, WHOLE))}
    if times:
        of_plan = [times.sampling, times.old_logp, times.training, times.weights]
        rows["planned"] = (*of_plan, times.offloading, times.between, times.total)
    sampled, trained = (typical(found, f"tokens_{what}") for what in ("sampled", "trained"))
    head = ["seconds of a rollout", *spent, "whole", "tokens sampled/s", "tokens trained/s"]
    lines = [
        [name, *(f"{s:.2f}" for s in row), f"{sampled / row[0]:,.0f}", f"{trained / row[-1]:,.0f}"]
        for name, row in rows.items()
    ]
    return markdown(head, lines)


def memory_table(name: str, found: list[Record], copied: float) -> str:
    given = [record["engine_gib_given_back"] for record in found]
    gib, seconds = typical(found, "weights_gib"), typical(found, "seconds/weights")
    rate = gib * GIB / seconds
    cells = {
        "": name,
        "tokens/answer": f"{typical(found, 'response_length_mean'):,.0f}",
        "cut off": f"{typical(found, 'truncated_fraction'):.1%}",
        "in use at most, GiB": f"{max(record['peak_memory_gib'] for record in found):.1f}",
        "given back, GiB": f"{min(given):.2f}–{max(given):.2f}",
        "in use asleep, GiB": f"{typical(found, 'device_gib_while_asleep'):.1f}",
        "weights, GiB": f"{gib:.3f}",
        "GB/s": f"{rate / 1e9:.2f}",
        "× a copy's time": f"{copied / rate:.1f}",
        "mean |Δlogp|": f"{typical(found, 'logp_delta_mean'):.1e}",
        "max": f"{max(record['logp_delta_max'] for record in found):.1e}",
        "probe": f"{typical(found, 'probe_delta_mean'):.1e}",
    }
    return markdown(list(cells), [list(cells.values())])


def arguments() -> argparse.Namespace:
    on_cuda = torch.cuda.is_available()
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--models", nargs="+", choices=SHAPES, default=["0.5B", "7B"] if on_cuda else ["toy"])
    add("--layers", type=int, help="of every model; default: what fits")
    add("--answer-tokens", type=int, default=1000 if on_cuda else 40, help="about, in the mean")
    add("--longest", type=int, default=4032 if on_cuda else 128, help="tokens of an answer")
    add("--questions", type=int, default=16 if on_cuda else 8, help="a rollout, a multiple of 4")
    add("--rollouts", type=int, default=2, help="measured ones")
    add("--limit-s", type=float, default=3600.0, help="for the runs of each model")
    add("--micro-batch", type=int, default=16_384 if on_cuda else 512, help="tokens")
    add("--max-sequences", type=int, default=512 if on_cuda else 64, help="answers at once")
    add("--memory-fraction", type=float, default=0.6, help="of the GPU, for vLLM")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16" if on_cuda else "float32")
    add("--quantization", choices=["none", "fp8"], default="none", help="of the engine")
    add("--recompute", choices=["none", "selective", "full"], default="selective")
    add("--offload", action=argparse.BooleanOptionalAction, help="default: on a GPU, in bfloat16")
    add("--gpu", choices=CARDS, default=_card(), help="that is planned for; default: this one")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more of the recipe")
    args = parser.parse_args()
    if args.questions < 4 or args.questions % 4:
        parser.error(f"--questions was {args.questions}; it may be 4, 8, 12 …")
    if args.offload is None:
        args.offload = on_cuda and args.dtype == "bfloat16"
    return args


def _card() -> str | None:
    """The first GPU's, if the plan knows it: NVIDIA H100 80GB HBM3, NVIDIA H200, NVIDIA B200."""
    if not shutil.which("nvidia-smi"):
        return None
    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(words, capture_output=True, text=True).stdout.lower().split("\n")
    return next((card for card in CARDS if card in names[0].split()), None)


def main() -> None:
    args, failed = arguments(), []
    for shape in args.models:
        with tempfile.TemporaryDirectory() as name:
            try:
                loop(shape, Path(name), args)
            except LoopError as error:
                print(f"{shape}: {error}", file=sys.stderr)
                failed.append(shape)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def loop(shape: str, folder: Path, args: argparse.Namespace) -> None:
    path, model = folder / "recipe.yaml", folder / "model"
    path.write_text(yaml.safe_dump(recipe_of(model, folder, args)))
    num_layers = args.layers or layers_that_fit(shape, path, args)
    print(f"{shape}: {num_layers} layers", file=sys.stderr)
    dtype = getattr(torch, args.dtype)
    elsewhere(write_model, model, shape, num_layers, args.answer_tokens, dtype)
    (first, *rest), said = measure(path, folder / "run" / FILE_NAME, args)
    found, which = (rest, f"medians of {len(rest)}") if rest else ([first], "the first, with start")
    times = planned(path, args.set, args.gpu, found) if args.gpu else None
    title = f"{shape}, {num_layers} layers"
    print(f"\n## {title}: {args.questions} questions × {GROUP} answers, {args.dtype}", end="")
    print(f", engine's quantization {args.quantization}, torch {torch.__version__}; {which}\n")
    print(seconds_table(title, found, times), end="\n\n")
    print(memory_table(title, found, elsewhere(copy_rate)), flush=True)
    for line in dict.fromkeys(line for line in said.splitlines() if "differ by" in line):
        print(f"warned: {line}")


if __name__ == "__main__":
    main()
