"""The command `megatron-nft train`, whole: sampling, judging, training, resuming, exporting."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import COLD_START, RECIPE, lasting, train, write_rows
from toys import save_model, train_tokenizer

from megatron_nft import arithmetic
from megatron_nft.config import DataConfig, SourceConfig
from megatron_nft.metrics import read_metrics
from megatron_nft.problems import load_problems

pytestmark = pytest.mark.processes
SHARED = Path(__file__).parents[2] / "shared" / "data"
MOE = {
    "vocab_size": len(arithmetic.VOCABULARY),
    "hidden_size": 128,
    "head_dim": 32,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "eos_token_id": arithmetic.VOCABULARY.index(arithmetic.END),
    "pad_token_id": 0,
}


def convert(*arguments: object) -> str:
    """`megatron-nft convert`; what it prints."""
    command = [sys.executable, "-m", "megatron_nft", "convert", *map(str, arguments)]
    return subprocess.run(
        command, stdout=subprocess.PIPE, text=True, timeout=100, check=True
    ).stdout


def test_metrics_hold_what_a_step_is_judged_by(root: Path) -> None:
    records = read_metrics(root / "nft")
    assert [r["step"] for r in records] == list(range(9))  # evaluation first, then 2 a rollout
    every_step = {"rollout", "loss", "grad_norm", "lr", "entropy", "clip_fraction"}
    every_step |= {"ratio_q01", "ratio_q50", "ratio_q99"}
    every_rollout = {"accuracy_all", "accuracy_kept", "groups_kept_fraction", "unverifiable_rate"}
    every_rollout |= {"response_length_mean", "truncated_fraction", "logp_delta_mean"}
    every_rollout |= {"logp_delta_max", "tokens_per_second", "peak_memory_gib", "seconds/update"}
    for record in records[1:]:
        assert every_step <= record.keys()
    for record in records[2::2]:
        assert every_rollout <= record.keys()
        assert record["logp_delta_max"] <= 1e-4  # the engine holds the trainer's weights
        assert 0 < record["accuracy_kept"] < 1
    first, second = records[1], records[2]
    assert first["ratio_q01"] == pytest.approx(1, abs=1e-5)  # on-policy
    assert second["ratio_q99"] > 1.0001  # no longer
    assert (root / "nft" / "tensorboard").is_dir()


def test_a_checkpoint_converts_by_itself_to_what_the_run_exports(root: Path) -> None:
    checkpoint, out = root / "nft" / "checkpoints" / "rollout_4", root / "converted"
    convert("megatron-to-hf", "--checkpoint", checkpoint, "--out", out)
    assert "equal" in convert("compare", out, root / "nft" / "hf").splitlines()
    found = json.loads(convert("inspect", "--json", checkpoint).splitlines()[-1])
    assert (found["rollout"], found["step"]) == (4, 8)
    assert found["parallel layout"]["tensor"] == 2


def test_a_mixture_of_experts_from_cold_start_to_nft(root: Path) -> None:
    """The recipe at EP 2: engines, balance and export of a Qwen3-MoE."""
    model = root / "moe" / "model"
    save_model(model, "qwen3_moe", **MOE)
    for file in (root / "model").glob("tokenizer*"):
        shutil.copy(file, model)
    folder = root / "moe"
    experts = ["parallel.tensor=1", "parallel.expert=2", "parallel.num_processes=2"]
    cold = [f"run_dir={folder}/cold", f"model.path={model}", *experts]
    train(root / "cold.yaml", *cold)
    train(root / "recipe.yaml", f"run_dir={folder}/nft", f"model.path={folder}/cold/hf", *experts)
    records = read_metrics(folder / "nft")
    assert [r["step"] for r in records] == list(range(9))
    assert max(r["logp_delta_max"] for r in records[2::2]) <= 1e-4
    out = folder / "converted"
    convert("megatron-to-hf", "--checkpoint", folder / "nft/checkpoints/rollout_4", "--out", out)
    assert "equal" in convert("compare", out, folder / "nft" / "hf").splitlines()


def test_data_parallel_ranks_train_as_tensor_parallel_ones_do(root: Path) -> None:
    run_dir = root / "dp"
    overrides = ["parallel.tensor=1", "parallel.num_processes=2", "rollouts=1"]
    train(root / "recipe.yaml", f"run_dir={run_dir}", *overrides)
    for ours, theirs in zip(lasting(run_dir)[1:], lasting(root / "nft")[1:3], strict=True):
        for key in ("loss", "grad_norm", "entropy"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("split", ["pipeline", "context"])
def test_pipeline_and_context_parallel_runs_are_the_same(root: Path, split: str) -> None:
    """That they resume to the bit, test_step shows."""
    overrides = ["parallel.tensor=1", f"parallel.{split}=2"]
    train(root / "recipe.yaml", f"run_dir={root / split}", *overrides, "rollouts=1")
    for ours, theirs in zip(lasting(root / split)[1:], lasting(root / "nft")[1:3], strict=True):
        for key in ("loss", "grad_norm", "entropy"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 and a tokenizer of the real files' text, cold-started on some answers."""
    if not SHARED.is_dir():
        pytest.skip(f"the real data files are not at {SHARED}")
    root = tmp_path_factory.mktemp("real")
    text = [json.loads(line) for line in (SHARED / "gsm8k_train.jsonl").open()][:400]
    rows = [(t["question"], t["answer"].split("####")[1].strip().replace(",", "")) for t in text]
    tokenizer = train_tokenizer(root / "model", [q for q, _ in rows])
    raw = DataConfig(template="raw", max_prompt_tokens=4096)
    source = SourceConfig(path=str(SHARED / "dapo_aime24.parquet"))
    problems = load_problems(source, raw, tokenizer).problems
    rows += [(tokenizer.decode(p.prompt_tokens), p.answer) for p in problems] * 12
    write_rows(root / "cold.jsonl", rows)
    (root / "cold.yaml").write_text(COLD_START.format(root=root, tensor=1, longest=500))
    train(root / "cold.yaml", "data.on_long_prompt=skip", "data.deduplicate=false")
    return root


@pytest.mark.parametrize("file", ["gsm8k_train.jsonl", "dapo_aime24.parquet"])
def test_two_steps_on_real_files(real: Path, file: str) -> None:
    run_dir = real / file.partition(".")[0]
    (real / "recipe.yaml").write_text(RECIPE.format(root=real))
    train(
        real / "recipe.yaml",
        f"run_dir={run_dir}",
        f"data.train[0].path={SHARED / file}",
        "data.max_prompt_tokens=500",
        "data.on_long_prompt=skip",
        "parallel.tensor=1",
        "rollouts=1",
        "rollout.questions=4",
        "rollout.answers=16",
        "optimizer.questions_per_minibatch=2",
        "optimizer.tokens_per_microbatch=4096",
        "evaluate.sets=[]",
    )
    steps = read_metrics(run_dir)
    assert [record["step"] for record in steps] == [1, 2]
    assert all(record["grad_norm"] > 0 for record in steps)
    assert steps[-1]["unverifiable_rate"] == 0
