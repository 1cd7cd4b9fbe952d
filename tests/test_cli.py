"""Mistakes at the command line: one clear message, before anything starts, and nothing is lost."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from toys import VOCAB_SIZE, save_qwen2, save_tokenizer

from megatron_nft import processes, recipe

RECIPE = """
run_dir: run
rollouts: 2
model: {path: model, dtype: float32}
data: {train: [{path: train.jsonl}], template: raw, max_prompt_tokens: 8}
rollout: {questions: 2, questions_asked: 4, answers: 4, max_response_tokens: 16}
optimizer: {questions_per_minibatch: 2, tokens_per_microbatch: 64}
evaluate: {sets: [{path: heldout.jsonl}]}
"""
ROWS = [{"question": f"{i}+{i}=", "answer": str(2 * i), "solution": f"{2 * i}"} for i in range(9)]
MAX_CPU_SECONDS = 20.0  # until a user knows: below 10 on a host that has nothing else to do


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a recipe, a model and data that are all right."""
    monkeypatch.chdir(tmp_path)
    save_tokenizer(save_qwen2(tmp_path / "model"))
    Path("recipe.yaml").write_text(RECIPE)
    write_rows("train.jsonl", *ROWS)
    write_rows("heldout.jsonl", *ROWS[:3])
    return tmp_path


def write_rows(name: str, *rows: dict | str) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(name).write_text("".join(f"{line}\n" for line in lines))


def snapshot(root: Path) -> dict[str, Any]:
    """Every file's content and time, so that a change of either is seen."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in root.rglob("*")
    }


# what a user may get wrong


def edit_config(**changes: Any) -> None:
    file = Path("model/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(name: str) -> None:
    file = Path(name)
    file.write_bytes(file.read_bytes()[:-100])


def begin_run(*overrides: str) -> None:
    """What a run leaves in its directory."""
    Path("run/checkpoints/rollout_1").mkdir(parents=True)
    Path("run/checkpoints/rollout_1/complete.json").write_text("{}")
    Path("run/metrics.jsonl").write_text('{"step": 1}\n')
    recipe.save(recipe.load(Path("recipe.yaml"), overrides), Path("run/config.yaml"))


@dataclass(frozen=True)
class Mistake:
    words: tuple[str, ...]  # of the message: key, value, remedy
    make: Callable[[], Any] = lambda: None
    overrides: tuple[str, ...] = ()


MISTAKES = {
    # the recipe
    "a key that does not exist": Mistake(
        ("recipe.yaml: there is no key rollout.answer;", "the nearest is rollout.answers"),
        lambda: Path("recipe.yaml").write_text(RECIPE.replace("answers:", "answer:")),
    ),
    "a mistyped override": Mistake(
        ("override 'optimiser.lr=1e-5': there is no key optimiser", "the nearest is optimizer"),
        overrides=("optimiser.lr=1e-5",),
    ),
    "no recipe": Mistake(
        ("recipe.yaml: there is no such file (looked for /",),
        lambda: Path("recipe.yaml").unlink(),
    ),
    "negative and zero values, all at once": Mistake(
        ("rollouts was 0; it may be at least 1", "\n  optimizer.lr was -1.0; it may be above 0"),
        overrides=("rollouts=0", "optimizer.lr=-1"),
    ),
    # the model
    "no model directory": Mistake(
        ("model.path: nowhere has no config.json", "give the directory of a Hugging Face model"),
        overrides=("model.path=nowhere",),
    ),
    "a model directory without config": Mistake(
        ("model.path: model has no config.json",), lambda: Path("model/config.json").unlink()
    ),
    "a config that is not JSON": Mistake(
        ("model/config.json: not JSON", "download it again"),
        lambda: Path("model/config.json").write_text("{"),
    ),
    "an unsupported architecture": Mistake(
        ("model.path: model is a PhiForCausalLM; supported: Qwen2ForCausalLM",),
        lambda: edit_config(architectures=["PhiForCausalLM"], model_type="phi"),
    ),
    "no weights": Mistake(
        ("model.path: model holds neither model.safetensors nor",),
        lambda: Path("model/model.safetensors").unlink(),
    ),
    "truncated weights": Mistake(
        ("model/model.safetensors: damaged or truncated", "download it again"),
        lambda: truncate("model/model.safetensors"),
    ),
    "weights of another model": Mistake(
        ("mlp.gate_proj.weight has shape (48, 32), but config.json makes it (64, 32)",),
        lambda: edit_config(intermediate_size=64),
    ),
    "too few positions": Mistake(
        ("data.max_prompt_tokens + rollout.max_response_tokens = 24", "embeddings = 16"),
        lambda: edit_config(max_position_embeddings=16),
    ),
    "no tokenizer": Mistake(
        ("model.path: model has no tokenizer: none of tokenizer.json, vocab.json",),
        lambda: Path("model/tokenizer.json").unlink(),
    ),
    "a broken tokenizer": Mistake(
        ("model.path: model has no tokenizer that loads: ",),
        lambda: Path("model/tokenizer.json").write_text("{}"),
    ),
    "a larger model's tokenizer": Mistake(
        (f"has {VOCAB_SIZE} tokens, but the model's vocab_size is 60",),
        lambda: save_qwen2(Path("model"), vocab_size=60),
    ),
    # the layout
    "TP that does not divide the heads": Mistake(
        ("parallel.tensor=3 does not divide the model's 4 attention heads",),
        overrides=("parallel.tensor=3",),
    ),
    "TP that does not divide the key-value heads": Mistake(
        ("parallel.tensor=4 does not divide the model's 2 key-value heads",),
        overrides=("parallel.tensor=4",),
    ),
    "stages that do not divide the layers": Mistake(
        ("parallel.pipeline=2 · parallel.virtual_pipeline=2 does not divide the model's 2 layers",),
        overrides=("parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    ),
    "FP8 on a CPU host": Mistake(
        ("fp8.format=hybrid needs a GPU and Transformer Engine, and this host lacks CUDA",),
        overrides=("fp8.format=hybrid", "model.dtype=bfloat16"),
    ),
    "Transformer Engine's layers on a CPU host": Mistake(
        ("model.layers=transformer_engine needs a GPU and Transformer Engine",),
        overrides=("model.layers=transformer_engine",),
    ),
    "NCCL on a CPU host": Mistake(
        ("rollout.weight_transfer=nccl: this host has no GPU; set gloo or files",),
        overrides=("rollout.engine=remote", "rollout.weight_transfer=nccl"),
    ),
    "engines larger than the job": Mistake(
        ("rollout.tensor=2 does not divide the 1 processes",), overrides=("rollout.tensor=2",)
    ),
    # the data
    "no data file": Mistake(
        ("absent.jsonl: there is no such file (looked for /",),
        overrides=("data.train[0].path=absent.jsonl",),
    ),
    "an empty data file": Mistake(
        ("train.jsonl: the file is empty",), lambda: write_rows("train.jsonl")
    ),
    "no answer column": Mistake(
        ("train.jsonl, line 1: no answer column", "question, reply", "`answer: <column>`"),
        lambda: write_rows("train.jsonl", {"question": "1+1=", "reply": "2"}),
    ),
    "a malformed line": Mistake(
        ("train.jsonl, line 3: malformed JSON", '{"question": "1+'),
        lambda: write_rows("train.jsonl", *ROWS[:2], '{"question": "1+', *ROWS[2:]),
    ),
    "a malformed line in held-out data": Mistake(
        ("heldout.jsonl, line 2: malformed JSON",),
        lambda: write_rows("heldout.jsonl", ROWS[0], "{"),
    ),
    "only malformed lines, skipped": Mistake(
        ("train.jsonl: no problem left: 2 rows skipped (malformed JSON: 2)",),
        lambda: write_rows("train.jsonl", "{", "{"),
        ("data.on_bad_row=skip",),
    ),
    "a prompt too long": Mistake(
        ("train.jsonl, line 1: the prompt has 9 tokens, data.max_prompt_tokens is 8", "skip"),
        lambda: write_rows("train.jsonl", {"question": "123456789", "answer": "1200"}),
    ),
    "no worked solutions for sft": Mistake(
        ("train.jsonl: 1 of 1 rows have no worked solution", "name its column with `solution:`"),
        lambda: write_rows("train.jsonl", {"question": "1+1=", "answer": "2"}),
        ("objective.name=sft",),
    ),
    # the run directory
    "a run directory of another recipe": Mistake(
        ("run_dir: run belongs to a run with other values of optimizer.lr;", "another run_dir"),
        lambda: begin_run("optimizer.lr=3e-6"),
    ),
    "a file for a run directory": Mistake(
        ("run_dir: run is a file; give a directory",), lambda: Path("run").touch()
    ),
}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have started a run's processes."""
    commands: list[list[str]] = []

    def start(command: list[str], _environment: Any) -> int:
        commands.append(command)
        return 3

    monkeypatch.setattr(processes, "_run_agent", start)
    monkeypatch.setattr(processes.os, "execve", lambda _, command, env: commands.append(command))
    return commands


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_before_anything_starts(
    name: str, root: Path, started: list[list[str]]
) -> None:
    mistake = MISTAKES[name]
    mistake.make()
    before = snapshot(root)
    with pytest.raises(ValueError, match=r"\w") as raised:
        processes.run(Path("recipe.yaml"), mistake.overrides)
    for words in mistake.words:
        assert words in str(raised.value)
    assert not started
    assert snapshot(root) == before


AS_A_USER = [
    "a key that does not exist",
    "a mistyped override",
    "negative and zero values, all at once",
    "no model directory",
    "truncated weights",
    "TP that does not divide the heads",
    "a malformed line",
    "a run directory of another recipe",
]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m megatron_nft …`, as a user runs it."""
    whole = [sys.executable, "-m", "megatron_nft", *arguments]
    return subprocess.run(whole, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", AS_A_USER)
def test_a_user_gets_one_message_and_soon(name: str, root: Path) -> None:
    mistake = MISTAKES[name]
    mistake.make()
    before, cpu_before = snapshot(root), cpu_seconds()
    done = command("train", "recipe.yaml", *mistake.overrides)
    taken = cpu_seconds() - cpu_before
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("megatron-nft: error: ")
    assert "Traceback" not in done.stderr
    for words in mistake.words:
        assert words in done.stderr
    lines = done.stderr.splitlines()
    assert all(line.startswith("  ") for line in lines[1:])  # of the same message
    assert snapshot(root) == before
    assert taken < MAX_CPU_SECONDS


def cpu_seconds() -> float:
    """CPU time of the children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", ["demo", "train", "report", "--version"]),
        ("demo", ["--out DIR", "--seed N", "runs/demo"]),
        ("train", ["RECIPE.yaml", "key=value", "example: megatron-nft train recipe.yaml"]),
        ("report", ["RUN_DIR", "--out FILE.png"]),
    ],
)
def test_help_says_what_can_be_given(name: str, words: list[str]) -> None:
    done = command(*name.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for word in words:
        assert word in done.stdout


def test_a_report_of_no_run(root: Path) -> None:
    done = command("report", "model")
    assert done.returncode == 2
    expected = "megatron-nft: error: model has no metrics.jsonl: is it a run directory?\n"
    assert done.stderr == expected
    assert not (root / "model" / "report.png").exists()


# what is right


def test_a_right_recipe_starts_its_processes(root: Path, started: list[list[str]]) -> None:
    overrides = ["parallel.tensor=2", "data.max_prompt_tokens=7"]
    assert processes.run(Path("recipe.yaml"), overrides) == 3  # their exit code
    [launch] = started
    assert launch[launch.index("--nproc-per-node") + 1] == "2"
    assert launch[-4:] == ["train", "recipe.yaml", *overrides]
    assert {path.name for path in Path("run").iterdir()} == {"logs"}


@pytest.mark.parametrize(
    ("rows", "override"),
    [
        (['{"question": "1+', *ROWS], "data.on_bad_row=skip"),
        ([{"question": "123456789", "answer": "1200"}, *ROWS], "data.on_long_prompt=skip"),
    ],
)
def test_rows_that_may_be_skipped(
    rows: list[dict | str], override: str, started: list[list[str]]
) -> None:
    write_rows("train.jsonl", *rows)
    processes.run(Path("recipe.yaml"), [override])
    assert len(started) == 1


@pytest.mark.parametrize(
    "override", ["rollouts=9", "evaluate.every=1", "checkpoint.keep=5", "verify.timeout_s=3"]
)
def test_a_run_goes_on_with_other_ends_and_other_looks(
    override: str, root: Path, started: list[list[str]]
) -> None:
    begin_run()
    before = snapshot(root / "run")
    processes.run(Path("recipe.yaml"), [override])
    assert len(started) == 1
    after = snapshot(root / "run")
    assert {path: after[path] for path in before} == before


def test_a_server_is_started_as_a_run_would_start_its_own(
    root: Path, started: list[list[str]]
) -> None:
    overrides = ["data.max_prompt_tokens=7", "rollout.max_sequences=3", "seed=5"]
    processes.serve(Path("recipe.yaml"), overrides, "node7", 8001)
    [launch] = started
    options = dict(pairwise(launch))
    expected = {"--model": "model", "--max-model-len": "23", "--max-num-seqs": "3", "--seed": "5"}
    expected |= {"--host": "node7", "--port": "8001"}
    assert {key: options[key] for key in expected} == expected
    assert not Path("run").exists()


def test_a_server_of_a_model_that_is_not_there(root: Path, started: list[list[str]]) -> None:
    with pytest.raises(ValueError, match=r"model.path: nowhere has no config.json"):
        processes.serve(Path("recipe.yaml"), ["model.path=nowhere"], "node7", 8001)
    assert started == []
