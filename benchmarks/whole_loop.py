"""`megatron-nft train` with its engine beside the policy: where a rollout's time and memory go.

    .venv/bin/python benchmarks/whole_loop.py --models 0.5B 7B    # a GPU
    .venv/bin/python benchmarks/whole_loop.py --models toy        # a CPU host, a minute

One process, as a recipe runs it: vLLM samples answers to --questions questions, 16 each; they are
judged; the trainer's log-probabilities; optimizer steps of a quarter of the questions; the weights
in place into the engine, with both of their proofs. The models are random ones of Qwen2.5's shapes
whose answers end by chance (benchmarks/strangers.py), and right is what a coin says of an answer's
text: practically every group is mixed, and nothing is learnt.

seconds   medians of --rollouts, after one that warms up; "all" counts nothing that is between
          the phases; planned: what `megatron-nft plan` says for --gpu and these lengths
memory    what torch allocated at most, what vLLM's sleep gave back, each time, and what is in use
          on the device meanwhile (a CPU host's engine keeps its memory)
weights   bytes of the whole tensors over the time of the hand-over, in which the engine wakes,
          digests every byte on both sides and answers the probe, beside a copy on the device
|Δlogp|   between trainer and engine: of sampled tokens, and of the probe

What follows the last rollout, its checkpoint and its export, is cut off.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from shapes import SHAPES, hf_config
from strangers import write_model, write_questions
from tqdm import tqdm

from checkpoints_conversion.hf_files import read_hf_config
from megatron_nft import recipe
from megatron_nft.metrics import FILE_NAME, GIB, Record
from megatron_nft.plan.cards import CARDS
from megatron_nft.plan.estimate import plan_for
from megatron_nft.plan.times import Times
from megatron_nft.plan.workload import workload_of

BENCHMARKS = Path(__file__).parent
GROUP, PROMPT = 16, 64  # answers to a question, its tokens
PHASES = {"sampling": "rollout", "old logp": "old_logp", "training": "update", "weights": "weights"}
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
            "questions_per_minibatch": max(1, args.questions // 4),
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
        if plan.fits:
            break
        stranger.num_hidden_layers -= 1
    return stranger.num_hidden_layers


def measure(
    path: Path, log: Path, overrides: Sequence[str], num_rollouts: int
) -> tuple[list[Record], str]:
    """The rollouts' records after the first one's, and what the run said."""
    command = [sys.executable, "-m", "megatron_nft", "train", str(path), *overrides]
    paths = [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    said = log.parent.parent / "said"
    with said.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            return _watched(process, log, num_rollouts), said.read_text()
        except RuntimeError:
            print(said.read_text()[-8000:], file=sys.stderr)
            raise
        finally:
            with suppress(ProcessLookupError):  # all of them have ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _watched(process: subprocess.Popen, log: Path, num_rollouts: int) -> list[Record]:
    with tqdm(total=num_rollouts + 1, desc="rollouts", unit="rollout") as bar:
        while True:
            has_ended = process.poll() is not None
            found = _rollouts(log)
            if len(found) > bar.n:
                bar.update(len(found) - bar.n)
            if len(found) > num_rollouts:
                return found[1 : num_rollouts + 1]
            if has_ended:
                raise RuntimeError(f"the run ended after {len(found)} rollouts")
            time.sleep(0.1)


def _rollouts(log: Path) -> list[Record]:
    """Each rollout's last record, which has its seconds."""
    if not log.exists():
        return []
    complete = log.read_text().split("\n")[:-1]
    return [r for r in map(json.loads, complete) if "seconds/rollout" in r]


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


def copy_rate(device: str) -> float:
    """Bytes a second of a copy on the device, by its bytes once."""
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
    sampled, trained = (typical(found, f"tokens_{what}") for what in ("sampled", "trained"))
    whole = sum(spent.values())
    head = ["seconds of a rollout", *spent, "all", "tokens sampled/s", "tokens trained/s"]
    rates = [f"{sampled / spent['sampling']:,.0f}", f"{trained / whole:,.0f}"]
    rows = [[name, *(f"{s:.2f}" for s in spent.values()), f"{whole:.2f}", *rates]]
    if times:
        of_plan = [times.sampling, times.old_logp, times.training, times.weights]
        of_plan += [sum(of_plan)]
        rates = [f"{sampled / times.sampling:,.0f}", f"{trained / of_plan[-1]:,.0f}"]
        rows.append(["planned", *(f"{s:.2f}" for s in of_plan), *rates])
    return markdown([head, *rows])


def memory_table(name: str, found: list[Record], copied: float) -> str:
    given = [record["engine_gib_given_back"] for record in found]
    gib, seconds = typical(found, "weights_gib"), typical(found, "seconds/weights")
    rate = gib * GIB / seconds
    cells = {
        "": name,
        "tokens/answer": f"{typical(found, 'response_length_mean'):,.0f}",
        "cut off": f"{typical(found, 'truncated_fraction'):.1%}",
        "peak GiB": f"{max(record['peak_memory_gib'] for record in found):.1f}",
        "given back, GiB": f"{min(given):.2f}–{max(given):.2f}",
        "in use asleep, GiB": f"{typical(found, 'device_gib_while_asleep'):.1f}",
        "weights, GiB": f"{gib:.3f}",
        "GB/s": f"{rate / 1e9:.2f}",
        "× a copy's time": f"{copied / rate:.1f}",
        "mean \\|Δlogp\\|": f"{typical(found, 'logp_delta_mean'):.1e}",
        "max": f"{max(record['logp_delta_max'] for record in found):.1e}",
        "probe": f"{typical(found, 'probe_delta_mean'):.1e}",
    }
    return markdown([list(cells), list(cells.values())])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---|" + "---:|" * (len(rows[0]) - 1), *rest])


def arguments() -> argparse.Namespace:
    on_cuda = torch.cuda.is_available()
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--models", nargs="+", choices=SHAPES, default=["0.5B", "7B"] if on_cuda else ["toy"])
    add("--layers", type=int, help="of every model; default: what fits")
    add("--answer-tokens", type=int, default=1400 if on_cuda else 40, help="about, in the mean")
    add("--longest", type=int, default=4032 if on_cuda else 128, help="tokens of an answer")
    add("--questions", type=int, default=64 if on_cuda else 8, help="a rollout")
    add("--rollouts", type=int, default=4, help="measured ones")
    add("--micro-batch", type=int, default=16_384 if on_cuda else 512, help="tokens")
    add("--max-sequences", type=int, default=512 if on_cuda else 64, help="answers at once")
    add("--memory-fraction", type=float, default=0.6, help="of the GPU, for vLLM")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16" if on_cuda else "float32")
    add("--quantization", choices=["none", "fp8"], default="none", help="of the engine")
    add("--recompute", choices=["none", "selective", "full"], default="selective")
    add("--offload", action=argparse.BooleanOptionalAction, default=on_cuda)
    add("--gpu", choices=CARDS, default=_card(), help="that is planned for; default: this one")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more of the recipe")
    return parser.parse_args()


def _card() -> str | None:
    name = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    return next((card for card in CARDS if card in name), None)


def main() -> None:
    args = arguments()
    for shape in args.models:
        with tempfile.TemporaryDirectory() as name:
            loop(shape, Path(name), args)


def loop(shape: str, folder: Path, args: argparse.Namespace) -> None:
    path, model = folder / "recipe.yaml", folder / "model"
    path.write_text(yaml.safe_dump(recipe_of(model, folder, args)))
    num_layers = args.layers or layers_that_fit(shape, path, args)
    print(f"{shape}: {num_layers} layers", file=sys.stderr)
    write_model(model, shape, num_layers, args.answer_tokens, getattr(torch, args.dtype))
    torch.cuda.empty_cache()
    found, said = measure(path, folder / "run" / FILE_NAME, args.set, args.rollouts)
    times = planned(path, args.set, args.gpu, found) if args.gpu else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    title = f"{shape}, {num_layers} layers"
    print(f"\n## {title}: {args.questions} questions × {GROUP} answers, {args.dtype}", end="")
    print(f", engine's quantization {args.quantization}, torch {torch.__version__}\n")
    print(seconds_table(title, found, times), end="\n\n")
    print(memory_table(title, found, copy_rate(device)), flush=True)
    for line in dict.fromkeys(line for line in said.splitlines() if "differ by" in line):
        print(f"warned: {line}")


if __name__ == "__main__":
    main()
