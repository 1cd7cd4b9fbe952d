"""Sampling and what surrounds it, beside what each part could cost at least or costs elsewhere.

    .venv/bin/python benchmarks/rollout.py [--parts generate weights collect overlap] [--demo DIR]

generate  tokens/s of `ColocatedEngine.generate` and of `vllm.LLM.generate`, the same engine and
          requests, in turns: the demo's cold-started model, --questions questions × 16 answers
weights   a hand-over to the colocated engine, its proofs included, and a memory copy of the bytes
collect   dynamic sampling by the measured share of mixed groups and by the official code's fixed
          three times as many: batches of 48 groups of the demo's task, surplus thrown away
overlap   seconds a rollout of `megatron-nft train` with one training process and one server:
          sampling and training in turns (max_steps_off_policy 0) or at the same time (1), each on
          half of the cores, as they would have GPUs of their own, or both on all cores; and with
          two training processes and their engines on all cores, for comparison

The cold-started model is the demo's; --demo names a directory where `megatron-nft demo` was run.
Medians of --repeats turns. One thread a process, but for overlap on all cores, where a process has
as many as the run gives it.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from processes import run
from tables import markdown
from toys import save_qwen2, save_tokenizer

from megatron_nft import demo, recipe
from megatron_nft.config import Config
from megatron_nft.metrics import read_metrics

PARTS = ("generate", "weights", "collect", "overlap")
ANSWERS = 16
SIZES = {  # of random models whose weights are handed over
    "0.6M parameters": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3},
    "27M parameters": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 7},
    "160M parameters": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10},
}
REMOTE = {"rollout.engine": "remote", "parallel.tensor": 1}
AHEAD = REMOTE | {"rollout.max_steps_off_policy": 1}
OVERLAP = {  # name: overrides of the demo's recipe, and whether cores are halved
    "in turns, half of the cores each": (REMOTE, True),
    "at the same time, half of the cores each": (AHEAD, True),
    "in turns, all cores": (REMOTE, False),
    "at the same time, all cores": (AHEAD, False),
    "two processes with their engines": (
        {"parallel.tensor": 1, "parallel.num_processes": 2},
        False,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--demo", type=Path, help="a directory with the demo's cold start")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rollouts", type=int, default=8, help="of each run of `overlap`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if set(options.parts) - {"weights"}:
            options.demo = options.demo or cold_start(Path(folder) / "demo")
        for part in options.parts:
            globals()[part](options, Path(folder))


def cold_start(out: Path) -> Path:
    """The demo's task and its cold-started model."""
    demo.make_task(out, seed=0)
    overrides = [f"run_dir={out / 'cold-start'}", f"model.path={out / 'model'}"]
    overrides += [f"data.train[0].path={out / 'data' / 'demonstrations.jsonl'}"]
    overrides += [f"evaluate.sets[0].path={out / 'data' / 'heldout.jsonl'}"]
    train("demo-cold-start.yaml", overrides)
    return out


def train(name: str, overrides: Sequence[str]) -> None:
    """Run the command; what it says is shown where it fails."""
    command = [sys.executable, "-m", "megatron_nft", "train", str(demo.RECIPES / name), *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def config_of(folder: Path) -> Config:
    """The demo's recipe for its cold-started model, in one process."""
    overrides = [f"model.path={folder / 'cold-start' / 'hf'}", "parallel.tensor=1"]
    overrides += [f"data.train[0].path={folder / 'data' / 'train.jsonl'}"]
    overrides += [f"evaluate.sets[0].path={folder / 'data' / 'heldout.jsonl'}"]
    return recipe.load(demo.RECIPES / "demo.yaml", overrides)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{title}\n\n{markdown(columns, rows)}", flush=True)


# generate


def generate(options: argparse.Namespace, _: Path) -> None:
    """Ours and vLLM's own loop, in turns."""
    found = run(_generate, 1, config_of(options.demo), options.questions, options.repeats)[0]
    rates = {name: median(tokens / s for tokens, s in turns) for name, turns in found.items()}
    rows = [
        [
            name,
            f"{turns[0][0]:,}",
            f"{rates[name]:,.0f}",
            f"{rates[name] / rates['LLM.generate']:.2f}",
        ]
        for name, turns in found.items()
    ]
    table("Sampling", ("", "tokens", "tokens/s", "× LLM.generate"), rows)


def _generate(config: Config, num_questions: int, repeats: int) -> dict[str, list[Any]]:
    engine, problems = _engine(config), _problems(config)[:num_questions]
    expected = [1.0] * len(problems)
    sampling = _sampling(config, seed=0)
    prompts = [{"prompt_token_ids": p.prompt_tokens.tolist()} for p in problems]
    params = [engine._params(sampling, i, len(p.prompt_tokens)) for i, p in enumerate(problems)]

    def ours() -> int:
        answers = engine.generate(problems, expected, sampling)
        return sum(len(r.tokens) for _, responses in answers for r in responses)

    def theirs() -> int:
        from megatron_nft.policy import host

        with host.suspended():
            outputs = engine._llm.generate(prompts, params, use_tqdm=False)
        return sum(len(c.token_ids) for output in outputs for c in output.outputs)

    turns: dict[str, list[Any]] = {"ColocatedEngine.generate": [], "LLM.generate": []}
    for turn in range(repeats + 1):
        for name, function in zip(turns, (ours, theirs), strict=True):
            start = time.perf_counter()
            tokens = function()
            if turn:  # the first warms up
                turns[name].append((tokens, time.perf_counter() - start))
    return turns


def _engine(config: Config) -> Any:
    from transformers import AutoTokenizer

    from megatron_nft.policy import parallel
    from megatron_nft.rollout.colocated import ColocatedEngine

    parallel.initialize(config.parallel, seed=0)
    path = Path(config.model.path)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    tokenizer = AutoTokenizer.from_pretrained(path)
    return ColocatedEngine(path, tokenizer, config.rollout, config.model.dtype, longest, seed=0)


def _problems(config: Config) -> list[Any]:
    from transformers import AutoTokenizer

    from megatron_nft.problems import load_problems

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    return load_problems(config.data.train[0], config.data, tokenizer).problems


def _sampling(config: Config, seed: int) -> Any:
    from megatron_nft.rollout.engine import Sampling

    options = config.rollout
    return Sampling(ANSWERS, options.temperature, options.top_p, options.max_response_tokens, seed)


# weights


def weights(options: argparse.Namespace, folder: Path) -> None:
    """A hand-over beside a copy."""
    rows = []
    for name, sizes in SIZES.items():
        path = save_qwen2(folder / name, vocab_size=67, num_attention_heads=4, **sizes)
        save_tokenizer(path)
        num_bytes, handed, copied, off = run(_weights, 1, path, options.repeats)[0]
        row = [name, f"{num_bytes / 2**20:,.0f}", f"{handed:.3f}"]
        row += [f"{num_bytes / s / 1e9:.2f}" for s in (handed, copied)]
        rows.append([*row, f"{handed / copied:.1f}", f"{off:.1e}"])
    columns = "", "MiB", "hand-over s", "GB/s", "memory copy GB/s", "× the copy's time"
    columns += ("probe, mean |Δlogp|",)
    table("Weights, float32", columns, rows)


def _weights(path: Path, repeats: int) -> tuple[int, float, float, float]:
    import torch
    from policies import policy_of

    from megatron_nft.config import DataConfig, ModelConfig, RolloutConfig
    from megatron_nft.rollout.handover import hand_over

    config = Config(
        model=ModelConfig(path=str(path), dtype="float32"),
        data=DataConfig(max_prompt_tokens=32),
        rollout=RolloutConfig(max_response_tokens=32, max_sequences=32),
    )
    engine = _engine(config)
    policy = policy_of(config)
    whole = torch.cat([p.detach().flatten() for p in policy.chunks[0].parameters()])
    copy = torch.empty_like(whole)
    handed, copied, off = [], [], 0.0
    for version in range(repeats + 1):
        start = time.perf_counter()
        off = hand_over(policy, engine, version)["probe_delta_mean"]
        handed.append(time.perf_counter() - start)
        copied.append(_seconds(partial(copy.copy_, whole)))
    return whole.numel() * whole.element_size(), median(handed[1:]), median(copied[1:]), off


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# collect


def collect(options: argparse.Namespace, _: Path) -> None:
    """Questions asked by the measured share and by the official fixed number."""
    found = run(_collect, 1, config_of(options.demo), options.repeats)[0]
    rows = []
    for name, (asked, kept, sampled, used, asks, seconds) in found.items():
        row = [name, f"{asked}", f"{kept / asked:.0%}", f"{used:,}", f"{1 - used / sampled:.0%}"]
        rows.append([*row, f"{asks:.1f}", f"{seconds:.1f}"])
    columns = "", "questions asked", "mixed", "tokens trained", "tokens wasted", "asks a batch"
    table(f"Dynamic sampling, {options.repeats} batches", (*columns, "s a batch"), rows)


def _collect(config: Config, num_batches: int) -> dict[str, tuple[float, ...]]:
    from dataclasses import replace

    engine, problems = _engine(config), _problems(config)
    wanted = config.rollout.questions
    schemes = {"measured share": 0, "official, 3 × fixed": 3 * wanted}
    return {
        name: _batches(
            engine,
            problems,
            replace(config, rollout=replace(config.rollout, questions_asked=asked)),
            num_batches,
        )
        for name, asked in schemes.items()
    }


def _batches(engine: Any, problems: Sequence[Any], config: Config, num: int) -> tuple[float, ...]:
    """Questions, mixed groups, tokens sampled and trained on, asks and seconds a batch."""
    from megatron_nft.config import VerifyConfig
    from megatron_nft.rollout.collect import Collector, ask
    from megatron_nft.rollout.questions import QuestionOrder
    from megatron_nft.verify.verifier import Verifier

    collector = Collector(QuestionOrder(problems, seed=0), config.rollout)
    counts, start = [], 0.0

    def asker(
        rollout: int, problems: Sequence[Any], expected: Sequence[float], attempt: int
    ) -> Any:
        asks.append(len(problems))
        sampling = _sampling(config, seed=100 * rollout + attempt)
        return ask(engine, verifier, problems, expected, sampling)

    with Verifier(VerifyConfig(workers=1)) as verifier:
        for rollout in range(num + 1):
            if rollout == 1:  # the first learns the share
                counts, start = [], time.perf_counter()
            asks: list[int] = []
            batch = collector.batch(partial(asker, rollout), oldest=rollout)
            used = sum(len(r.tokens) for g in batch.groups for r in g.responses)
            tally = batch.tally
            counts.append((tally.num_groups, tally.num_mixed, tally.num_tokens, used, len(asks)))
    sums = [sum(column) for column in zip(*counts, strict=True)]
    return *sums[:4], sums[4] / num, (time.perf_counter() - start) / num


# overlap


def overlap(options: argparse.Namespace, folder: Path) -> None:
    """The same training, with sampling before and beside it."""
    cores = sorted(os.sched_getaffinity(0))
    middle = len(cores) // 2
    if not middle:
        sys.exit("overlap needs two cores")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in OVERLAP}
    for turn, name in enumerate([*OVERLAP] * options.repeats):
        own, is_halved = OVERLAP[name]
        given, out = overrides_of(options, own), folder / f"run{turn}"
        if is_halved:
            log = folder / f"server{turn}.log"
            with _server(given, cores[middle:], log) as address, _on(cores[:middle]):
                found[name].append(_step_seconds([*given, f"rollout.servers=[{address}]"], out))
        else:
            found[name].append(_step_seconds(given, out))
    medians = {
        name: {key: median(turn[key] for turn in turns) for key in turns[0]}
        for name, turns in found.items()
    }
    base = medians[next(iter(OVERLAP))]["step"]
    rows = [
        [
            name,
            f"{s['step']:.2f}",
            f"{s['rollout']:.2f}",
            f"{s['rest']:.2f}",
            f"{base / s['step']:.2f}",
        ]
        for name, s in medians.items()
    ]
    columns = "sampling and training", "s a rollout", "waiting for answers", "rest", "× first row"
    table("Overlap", columns, rows)


def overrides_of(options: argparse.Namespace, own: dict[str, Any]) -> list[str]:
    """Of the demo's recipe: nothing but sampling and training."""
    given = {f"data.train[0].path={options.demo / 'data' / 'train.jsonl'}"}
    given |= {f"model.path={options.demo / 'cold-start' / 'hf'}", f"rollouts={options.rollouts}"}
    given |= {"evaluate.sets=[]", "evaluate.stop_at_accuracy=0", "old_logp=rollout"}
    given |= {"checkpoint.every=0", "checkpoint.check_export=false"}
    return sorted(given | {f"{key}={value}" for key, value in own.items()})


@contextmanager
def _server(overrides: Sequence[str], cores: Sequence[int], log: Path) -> Iterator[str]:
    """The address of a vLLM server for the demo's recipe, on these cores."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "megatron_nft", "serve", str(demo.RECIPES / "demo.yaml")]
    with _on(cores), log.open("w") as file:
        process = subprocess.Popen(
            [*command, *overrides, "--port", str(port)], stdout=file, stderr=subprocess.STDOUT
        )
    try:
        yield f"http://127.0.0.1:{port}"
    except SystemExit:  # of train, which could not use it
        print(log.read_text(), file=sys.stderr)
        raise
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _on(cores: Sequence[int]) -> Iterator[None]:
    """Have this process, and those that it starts meanwhile, run on these cores alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _step_seconds(overrides: Sequence[str], out: Path) -> dict[str, float]:
    """Median seconds of a rollout, without the first two and the last."""
    train("demo.yaml", [*overrides, f"run_dir={out}"])
    return {key: median(values) for key, values in _phases(out).items()}


def _phases(out: Path) -> dict[str, list[float]]:
    rollouts = [r for r in read_metrics(out) if "seconds/rollout" in r][2:-1]
    seconds = [{k: v for k, v in r.items() if k.startswith("seconds/")} for r in rollouts]
    steps = [sum(each.values()) for each in seconds]
    waits = [each["seconds/rollout"] for each in seconds]
    rest = [step - wait for step, wait in zip(steps, waits, strict=True)]
    return {"step": steps, "rollout": waits, "rest": rest}


if __name__ == "__main__":
    main()
