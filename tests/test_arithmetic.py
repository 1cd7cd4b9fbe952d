"""The demo's task: sums that are right in every step, a tokenizer and a model that others load."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_nft import arithmetic
from megatron_nft.config import DataConfig, SourceConfig
from megatron_nft.problems import load_problems
from megatron_nft.rollout.groups import Verdict
from megatron_nft.verify.answers import judge


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("arithmetic")
    arithmetic.write_problems(directory, seed=0, num_train=3000, num_heldout=300)
    arithmetic.make_model(directory / "model", seed=0)
    return directory


@pytest.fixture(scope="module")
def rows(directory: Path) -> list[dict[str, str]]:
    return [row for name in ("train", "heldout") for row in read(directory, name)]


def read(directory: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


def operands(row: dict[str, str]) -> tuple[int, int]:
    first, second = re.fullmatch(r"(\d+)\+(\d+)=", row["question"]).groups()
    return int(first), int(second)


def test_answers_are_the_sums(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert int(row["answer"]) == sum(operands(row))
        assert judge(row["solution"], row["answer"]) is Verdict.CORRECT


def test_every_worked_step_is_right_and_leads_to_the_answer(rows: list[dict[str, str]]) -> None:
    for row in rows:
        *steps, box = row["solution"].split(",")
        sums = []
        for step in steps:
            terms, total = step.split("=")
            sums.append(sum(map(int, terms.split("+"))))
            assert int(total) == sums[-1]
        value = sums[-1]
        for column in reversed(sums[:-1]):
            value = 10 * value + column % 10
        assert box == rf"\boxed{{{value}}}"
        assert value == int(row["answer"])


def test_a_carry_is_the_third_summand_of_the_next_column() -> None:
    assert arithmetic.work_out(347, 285) == r"7+5=12,4+8+1=13,3+2+1=6,\boxed{632}"
    assert arithmetic.work_out(10, 89) == r"0+9=9,1+8=9,\boxed{99}"


def test_a_slip_carries_on_into_the_answer() -> None:
    slips = iter([-1, 0, 1])
    assert arithmetic.work_out(347, 283, lambda: next(slips)) == (
        r"7+3=9,4+8=12,3+2+1=7,\boxed{729}"
    )
    assert arithmetic.work_out(99, 99, lambda: 2) == r"9+9=20,9+9+2=22,\boxed{220}"


def test_demonstrations_are_the_train_problems_worked_with_slips_of_one(directory: Path) -> None:
    errors, verdicts = [], []
    pairs = zip(read(directory, "demonstrations"), read(directory, "train"), strict=True)
    for shown, right in pairs:
        assert (shown["question"], shown["answer"]) == (right["question"], right["answer"])
        *steps, box = shown["solution"].split(",")
        columns = []
        for step in steps:
            terms, total = step.split("=")
            columns.append(int(total))
            errors.append(abs(sum(map(int, terms.split("+"))) - int(total)))
        value = columns[-1]
        for column in reversed(columns[:-1]):
            value = 10 * value + column % 10
        assert box == rf"\boxed{{{value}}}"
        verdicts.append(judge(shown["solution"], shown["answer"]) is Verdict.CORRECT)
    assert set(errors) == {0, 1}
    assert sum(errors) / len(errors) == pytest.approx(arithmetic.SLIP_RATE, abs=0.02)
    assert 0.5 < sum(verdicts) / len(verdicts) < 0.7


def test_train_and_heldout_share_no_problem_in_either_order(directory: Path) -> None:
    train, heldout = (
        [tuple(sorted(operands(row))) for row in read(directory, name)]
        for name in ("train", "heldout")
    )
    assert (len(set(train)), len(set(heldout))) == (3000, 300)
    assert not set(train) & set(heldout)


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_the_sizes_are_mixed_evenly(directory: Path, name: str) -> None:
    sizes = [len(str(min(operands(row)))) for row in read(directory, name)]
    assert sizes == [len(str(max(operands(row)))) for row in read(directory, name)]
    for digits in arithmetic.NUM_DIGITS:
        assert sizes.count(digits) / len(sizes) == pytest.approx(1 / 3, abs=0.1)


def test_both_orders_occur(rows: list[dict[str, str]]) -> None:
    larger_first = [first > second for first, second in map(operands, rows)]
    assert sum(larger_first) / len(rows) == pytest.approx(0.5, abs=0.05)


def test_files_and_weights_depend_on_the_seed_alone(directory: Path, tmp_path: Path) -> None:
    def contents(folder: Path) -> list[bytes]:
        files = [*folder.glob("*.jsonl"), folder / "model" / "model.safetensors"]
        return [file.read_bytes() for file in sorted(files)]

    for seed in (0, 1):
        folder = tmp_path / str(seed)
        arithmetic.write_problems(folder, seed, num_train=3000, num_heldout=300)
        torch.manual_seed(seed + 5)
        state = torch.get_rng_state()
        arithmetic.make_model(folder / "model", seed)
        assert torch.equal(torch.get_rng_state(), state)
    assert contents(tmp_path / "0") == contents(directory)
    assert all(x != y for x, y in zip(contents(tmp_path / "1"), contents(directory), strict=True))


def test_tokenizer_gives_text_back_also_when_loaded_anew(
    directory: Path, rows: list[dict[str, str]]
) -> None:
    made, loaded = arithmetic.make_tokenizer(), AutoTokenizer.from_pretrained(directory / "model")
    for row in rows[:300]:
        text = row["question"] + row["solution"]
        tokens = made(text)["input_ids"]
        assert loaded(text)["input_ids"] == tokens
        assert len(tokens) == len(text) - len(arithmetic.BOX) + 1
        assert made.decode(tokens) == loaded.decode(tokens) == text
        assert loaded.decode([*tokens, loaded.eos_token_id], skip_special_tokens=True) == text


def test_tokenizer_has_a_text_for_all_that_the_model_may_sample(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    size = AutoModelForCausalLM.from_pretrained(directory / "model").config.vocab_size
    assert len(tokenizer) == size == len(arithmetic.VOCABULARY)
    assert tuple(tokenizer.convert_ids_to_tokens(range(size))) == arithmetic.VOCABULARY
    assert (tokenizer.eos_token, tokenizer.pad_token) == (arithmetic.END, arithmetic.PAD)


@pytest.mark.parametrize("name", ["train", "demonstrations", "heldout"])
def test_problems_fit_the_declared_lengths(directory: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    data = DataConfig(template="raw", max_prompt_tokens=arithmetic.MAX_PROMPT_TOKENS)
    source = SourceConfig(path=str(directory / f"{name}.jsonl"))
    loaded = load_problems(source, data, tokenizer)
    expected = read(directory, name)
    assert (len(loaded.problems), loaded.num_duplicates) == (len(expected), 0)
    for problem, row in zip(loaded.problems, expected, strict=True):
        assert tokenizer.decode(problem.prompt_tokens) == row["question"]
        assert tokenizer.decode(problem.solution_tokens) == row["solution"] + arithmetic.END
        assert len(problem.solution_tokens) <= arithmetic.MAX_RESPONSE_TOKENS


def test_longest_problem_fills_the_declared_lengths() -> None:
    lengths = count("5999+6999="), count(arithmetic.work_out(5999, 6999)) + 1
    assert lengths == (arithmetic.MAX_PROMPT_TOKENS, arithmetic.MAX_RESPONSE_TOKENS)


def count(text: str) -> int:
    return len(arithmetic.make_tokenizer()(text)["input_ids"])


def test_model_loads_in_float32_and_can_be_split_in_two(directory: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(directory / "model")
    config = model.config
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert config.model_type == "qwen2"
    for size in (config.num_attention_heads, config.num_key_value_heads, config.vocab_size):
        assert size % 2 == 0
    assert model.generation_config.eos_token_id == config.eos_token_id == 1
    logits = model(torch.tensor([[5, 6, 7]])).logits
    assert logits.shape == (1, 3, config.vocab_size)
    assert torch.isfinite(logits).all()
