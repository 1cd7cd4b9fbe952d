"""Data files of every layout into problems, and what is said of those that are broken."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from megatron_nft.config import DataConfig, SourceConfig
from megatron_nft.problems import LoadedProblems, load_problems
from megatron_nft.templates import INSTRUCTION, TEMPLATES

REAL = Path(__file__).parents[2] / "shared" / "data"
RAW = DataConfig(template="raw", max_prompt_tokens=100_000)
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(bos: bool = False, pieces: str = r"[\s\S]") -> Any:
    """A tokenizer of single characters: decoding gives the text back."""
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(32, 0x3000)]
    vocab = {token: i for i, token in enumerate(["<eos>", "<bos>", "<unk>", "\n", *characters])}
    model = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    model.decoder = decoders.Fuse()
    if bos:
        model.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<eos>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def write_lines(path: Path, *rows: Any) -> SourceConfig:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return SourceConfig(path=str(path))


def write_parquet(path: Path, rows: list[dict]) -> SourceConfig:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return SourceConfig(path=str(path))


def real(name: str) -> SourceConfig:
    if not (REAL / name).is_file():
        pytest.skip(f"needs {REAL / name}")
    return SourceConfig(path=str(REAL / name))


def read(loaded: LoadedProblems, tokenizer: Any) -> list[tuple[str, str, str | None]]:
    """Prompt, answer and solution of each problem, as text."""
    return [
        (
            tokenizer.decode(p.prompt_tokens),
            p.answer,
            None if p.solution_tokens is None else tokenizer.decode(p.solution_tokens),
        )
        for p in loaded.problems
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "1+1?", "answer": "2"}, ("1+1?", "2", None)),
        ({"problem": "1+1?", "answer": 2}, ("1+1?", "2", None)),
        ({"problem": "p", "question": "q", "answer": 27.0}, ("q", "27", None)),
        ({"question": "q", "answer": 0.5}, ("q", "0.5", None)),
        ({"question": "q", "answer": 0}, ("q", "0", None)),
        ({"question": " q ", "answer": " 2\n"}, (" q ", "2", None)),
        (
            {"question": "q", "answer": "1000 + 1 is\n<<1+1>>1,001\n#### 1,001"},
            ("q", "1001", "1000 + 1 is\n<<1+1>>1,001<eos>"),
        ),
        ({"question": "q", "answer": "#### (1,2)"}, ("q", "(1,2)", None)),
        ({"question": "q", "final_answer": ["$2$"]}, ("q", "$2$", None)),
        ({"question": "q", "final_answer": ["1", 3.0]}, ("q", "1, 3", None)),
        (
            {"question": "q", "final_answer": ["2"], "solution": ["One way", "Another"]},
            ("q", "2", "One way<eos>"),
        ),
        ({"problem": "q", "answer": "2", "solution": "So 2."}, ("q", "2", "So 2.<eos>")),
        ({"problem": "q", "answer": "2", "solution": None}, ("q", "2", None)),
        (
            {"problem": "q", "answer": r"\boxed{2}", "solution": "So 2."},
            ("q", "2", "So 2.<eos>"),
        ),
        # Minerva: the answer stands in the worked solution
        (
            {"problem": "q", "solution": r"\boxed{1}, no: \boxed{\frac{1}{2}} cm"},
            ("q", r"\frac{1}{2}", r"\boxed{1}, no: \boxed{\frac{1}{2}} cm<eos>"),
        ),
        # open-r1/DAPO-Math-17k-Processed: `solution` is the answer, no worked solution
        ({"prompt": "q", "solution": "34"}, ("q", "34", None)),
        (
            {"prompt": "q", "solution": "34", "reward_model": {"ground_truth": "34"}},
            ("q", "34", None),
        ),
        # DAPO
        (
            {
                "prompt": [{"role": "user", "content": "q"}],
                "reward_model": {"ground_truth": "34", "style": "rule"},
            },
            ("q", "34", None),
        ),
    ],
)
def test_layouts_are_the_same_in_every_kind_of_file(
    tmp_path: Path, tokenizer: Any, row: dict, expected: tuple
) -> None:
    (tmp_path / "a.json").write_text(json.dumps([row]))
    sources = [
        write_lines(tmp_path / "a.jsonl", row),
        SourceConfig(path=str(tmp_path / "a.json")),
    ]
    if not isinstance(row.get("final_answer"), list) or len(row["final_answer"]) == 1:
        sources.append(write_parquet(tmp_path / "a.parquet", [row]))
    loads = [load_problems(source, RAW, tokenizer) for source in sources]
    for loaded in loads:
        assert read(loaded, tokenizer) == [expected]
        assert (loaded.num_skipped, loaded.num_duplicates) == (0, 0)
        assert loaded.problems[0].prompt_tokens.dtype == "int32"
    assert len({loaded.problems[0].id for loaded in loads}) == 1


def test_columns_may_be_named(tmp_path: Path, tokenizer: Any) -> None:
    row = {
        "question": "not this",
        "answer": "not this",
        "extra": {"raw": {"text": "q"}},
        "a.b": "7",
        "why": "since 7",
    }
    for source in (
        write_lines(tmp_path / "a.jsonl", row),
        write_parquet(tmp_path / "a.parquet", [row]),
    ):
        named = replace(source, question="extra.raw.text", answer="a.b", solution="why")
        loaded = load_problems(named, RAW, tokenizer)
        assert read(loaded, tokenizer) == [("q", "7", "since 7<eos>")]


def test_a_named_solution_is_taken_even_where_it_is_the_answer(
    tmp_path: Path, tokenizer: Any
) -> None:
    source = write_lines(tmp_path / "a.jsonl", {"question": "q", "answer": "7", "full": "7"})
    loaded = load_problems(replace(source, solution="full"), RAW, tokenizer)
    assert read(loaded, tokenizer) == [("q", "7", "7<eos>")]


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("raw", "q"),
        ("boxed", f"q\n{INSTRUCTION}\n"),
        ("chat", f"<user>q\n{INSTRUCTION}\n<assistant>"),
        ("qwen-math", f"<system>{INSTRUCTION}\n<user>q\n<assistant>"),
    ],
)
def test_templates(tmp_path: Path, tokenizer: Any, template: str, prompt: str) -> None:
    source = write_lines(tmp_path / "a.jsonl", {"question": "q", "answer": "2"})
    loaded = load_problems(source, replace(RAW, template=template), tokenizer)
    assert read(loaded, tokenizer) == [(prompt, "2", None)]
    assert r"\boxed{}" in INSTRUCTION


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_keeps_its_own_instruction(tmp_path: Path, tokenizer: Any, template: str) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    source = write_lines(tmp_path / "a.jsonl", {"prompt": chat, "answer": "2"})
    loaded = load_problems(source, replace(RAW, template=template), tokenizer)
    expected = "s\n\nq" if template == "raw" else "<system>s\n<user>q\n<assistant>"
    assert read(loaded, tokenizer)[0][0] == expected


def test_plain_prompts_begin_with_the_tokenizers_bos_and_solutions_do_not(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(bos=True)
    source = write_lines(tmp_path / "a.jsonl", {"question": "q", "answer": "since\n#### 2"})
    assert read(load_problems(source, RAW, tokenizer), tokenizer) == [("<bos>q", "2", "since<eos>")]
    chat = load_problems(source, replace(RAW, template="chat"), tokenizer)
    assert tokenizer.decode(chat.problems[0].prompt_tokens).startswith("<user>q")


def test_tokenizers_that_lack_something_are_named(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    source = write_lines(tmp_path / "a.jsonl", {"question": "q", "answer": "since\n#### 2"})
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        load_problems(source, replace(RAW, template="chat"), tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no end-of-text token"):
        load_problems(source, RAW, tokenizer)


def test_repetitions_are_left_out_by_question_and_answer(tmp_path: Path, tokenizer: Any) -> None:
    pairs = [("q", "1"), ("q", "2"), ("q", "1"), ("r", "1"), ("q", "1")]
    rows = [{"question": q, "answer": a} for q, a in pairs]
    source = write_lines(tmp_path / "a.jsonl", *rows)
    loaded = load_problems(source, RAW, tokenizer)
    assert [(p, a) for p, a, _ in read(loaded, tokenizer)] == [("q", "1"), ("q", "2"), ("r", "1")]
    assert loaded.num_duplicates == 2
    every = load_problems(source, replace(RAW, deduplicate=False), tokenizer)
    assert [(p, a) for p, a, _ in read(every, tokenizer)] == pairs
    assert every.num_duplicates == 0
    assert len({p.id for p in every.problems}) == 5


def test_ids_depend_on_source_name_and_content_only(tmp_path: Path, tokenizer: Any) -> None:
    row, other = {"question": "q", "answer": "2"}, {"question": "r", "answer": "2"}
    source = write_lines(tmp_path / "a.jsonl", row)
    [first] = load_problems(source, RAW, tokenizer).problems
    assert first.source == "a"
    longer = replace(write_lines(tmp_path / "b.jsonl", other, row), name="a")
    boxed = load_problems(longer, replace(RAW, template="boxed"), tokenizer)
    assert boxed.problems[1].id == first.id == "e59c60761046cdc5"
    named = load_problems(replace(source, name="z"), RAW, tokenizer).problems[0]
    assert (named.source, named.id == first.id) == ("z", False)


GOOD_ROW = {"question": "good", "answer": "1"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"question": "q", ', ["malformed JSON", "Expecting", '{"question"']),
        ("[1, 2]", ["not an object", "[1, 2]"]),
        ("[" * 100_000, ["malformed JSON"]),
        ({"question": "q", "text": "x"}, ["no answer column", "question, text", "final_answer"]),
        ({"answer": "2"}, ["no question column", "the columns are answer;", "question, problem"]),
        ({}, ["no question column", "(none)"]),
        ({"question": "", "answer": "2"}, ["empty question", "'question' was ''"]),
        ({"question": " \n", "answer": "2"}, ["empty question"]),
        ({"question": None, "answer": "2"}, ["empty question", "was None"]),
        ({"question": 3, "answer": "2"}, ["wrong type of question", "int 3", "a string"]),
        ({"question": "q", "answer": ""}, ["empty answer"]),
        ({"question": "q", "answer": []}, ["empty answer"]),
        ({"question": "q", "answer": None, "solution": "2"}, ["empty answer", "'answer' was None"]),
        ({"question": "q", "answer": "so\n####  "}, ["empty answer", "####"]),
        ({"question": "q", "answer": r"so \boxed{ }"}, ["empty answer"]),
        ({"question": "q", "answer": True}, ["wrong type of answer", "bool True"]),
        ({"question": "q", "answer": {"x": 1}}, ["wrong type of answer", "dict"]),
        ({"question": "q", "answer": float("nan")}, ["wrong type of answer", "nan", "finite"]),
        ({"question": "q", "solution": "word " * 99}, ["solution without answer", "494"]),
        ({"question": "q", "answer": "2", "solution": 3}, ["wrong type of solution"]),
        ({"question": "half \ud83d", "answer": "2"}, ["broken question", "surrogate"]),
        ({"prompt": [], "answer": "2"}, ["empty question", "[]"]),
        ({"prompt": ["q"], "answer": "2"}, ["wrong type of question", "'q'", "role"]),
        ({"prompt": [{"role": "user"}], "answer": "2"}, ["empty question", "prompt.content"]),
        (
            {"prompt": [{"role": "assistant", "content": "x"}], "answer": "2"},
            ["wrong chat", "'assistant'"],
        ),
    ],
)
def test_a_bad_row_is_named_or_skipped_and_counted(
    tmp_path: Path, tokenizer: Any, row: Any, words: list[str]
) -> None:
    source = write_lines(tmp_path / "a.jsonl", GOOD_ROW, "", row, GOOD_ROW | {"answer": "3"})
    with pytest.raises(ValueError, match=re.escape(f"{source.path}, line 3: ")) as raised:
        load_problems(source, RAW, tokenizer)
    for word in words:
        assert word in str(raised.value)
    skipping = load_problems(source, replace(RAW, on_bad_row="skip"), tokenizer)
    assert [problem.answer for problem in skipping.problems] == ["1", "3"]
    assert skipping.skipped_reasons == {words[0]: 1}
    assert skipping.num_skipped == 1


def test_a_line_that_is_not_utf8(tmp_path: Path, tokenizer: Any) -> None:
    source = write_lines(tmp_path / "a.jsonl", GOOD_ROW)
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b'{"question": "caf\xe9", "answer": "2"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not UTF-8: .* byte 17"):
        load_problems(source, RAW, tokenizer)
    assert load_problems(source, replace(RAW, on_bad_row="skip"), tokenizer).num_skipped == 1


def test_line_separators_inside_strings_and_a_byte_order_mark(
    tmp_path: Path, tokenizer: Any
) -> None:
    row = '\ufeff{"question": "a\u2028b", "answer": "2"}'
    loaded = load_problems(write_lines(tmp_path / "a.jsonl", row), RAW, tokenizer)
    assert read(loaded, tokenizer) == [("a\u2028b", "2", None)]


def test_a_parquet_row_is_named_and_all_columns_are_listed(tmp_path: Path, tokenizer: Any) -> None:
    rows = [GOOD_ROW | {"answer": str(i)} for i in range(5000)]
    rows[4500]["answer"] = None
    source = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(ValueError, match=r"a\.parquet, row 4501: empty answer"):
        load_problems(source, RAW, tokenizer)
    source = write_parquet(tmp_path / "b.parquet", [{"question": "q", "url": "u", "note": "n"}])
    with pytest.raises(ValueError, match=r"row 1: no answer column: .* question, url, note;"):
        load_problems(source, RAW, tokenizer)


def test_files_that_cannot_be_read(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "a.csv").write_text("question,answer")
    (tmp_path / "lines.json").write_text('{"question": "q"}\n{"question": "r"}')
    (tmp_path / "one.json").write_text('{"question": "q"}')
    (tmp_path / "text.parquet").write_text("version https://git-lfs.github.com/spec/v1")
    messages = {
        "absent.jsonl": "there is no such file",
        "empty.jsonl": "the file is empty",
        "blank.jsonl": "no problem left: the file holds no rows",
        "a.csv": "the suffix was '.csv'; it may be .jsonl, .json, .parquet",
        "lines.json": "must be named .jsonl",
        "one.json": "held dict; it must be a list",
        "text.parquet": "broken or truncated parquet, at its start",
    }
    for name, message in messages.items():
        source = SourceConfig(path=str(tmp_path / name))
        with pytest.raises(ValueError, match=f"{name}: .*{re.escape(message)}"):
            load_problems(source, replace(RAW, on_bad_row="skip"), tokenizer)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_truncated_parquet(tmp_path: Path, tokenizer: Any, keep: float) -> None:
    source = write_parquet(tmp_path / "a.parquet", [GOOD_ROW] * 100)
    data = Path(source.path).read_bytes()
    Path(source.path).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match=r"a\.parquet: broken or truncated parquet"):
        load_problems(source, RAW, tokenizer)


def test_parquet_damaged_in_its_middle(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"question": f"q{i}", "answer": "1"} for i in range(20_000)]
    table = pyarrow.Table.from_pylist(rows)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=10_000, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20_000] = b"\xff" * 20_000
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet: broken or truncated parquet, after row \d"):
        load_problems(SourceConfig(path=str(path)), RAW, tokenizer)


def test_a_file_with_nothing_left_says_why(tmp_path: Path, tokenizer: Any) -> None:
    long = {"question": "long question", "answer": "1"}
    source = write_lines(tmp_path / "a.jsonl", "{", "{", {"question": "q"}, long)
    data = replace(RAW, max_prompt_tokens=5, on_bad_row="skip", on_long_prompt="skip")
    with pytest.raises(ValueError, match=r"no problem left: 4 rows skipped \(malformed JSON: 2, "):
        load_problems(source, data, tokenizer)


def test_long_prompts(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"question": "x" * n, "answer": "1"} for n in (4, 5, 6)]
    source = write_lines(tmp_path / "a.jsonl", *rows)
    data = replace(RAW, max_prompt_tokens=5)
    message = r"a\.jsonl, line 3: the prompt has 6 tokens, data\.max_prompt_tokens is 5"
    with pytest.raises(ValueError, match=message):
        load_problems(source, data, tokenizer)
    loaded = load_problems(source, replace(data, on_long_prompt="skip"), tokenizer)
    assert [len(problem.prompt_tokens) for problem in loaded.problems] == [4, 5]
    assert loaded.skipped_reasons == {"prompt too long": 1}


def test_an_unknown_template_lists_the_known(tmp_path: Path, tokenizer: Any) -> None:
    source = write_lines(tmp_path / "a.jsonl", GOOD_ROW)
    with pytest.raises(ValueError, match=r"'nope'; it may be raw, boxed, chat, qwen-math"):
        load_problems(source, replace(RAW, template="nope"), tokenizer)


@pytest.mark.parametrize(
    ("name", "count", "first_answer", "num_solutions"),
    [
        ("aime24.jsonl", 30, "204", 30),
        ("amc23.jsonl", 40, "27", 0),
        ("minerva_math.jsonl", 272, "1.6", 272),
        (
            "olympiadbench.jsonl",
            675,
            "2",
            671,
        ),  # the hub's copy has 674; 4 solutions are but the answer
        ("gsm8k_train.jsonl", 7473, "72", 7473),
        ("gsm8k_test.jsonl", 1319, "18", 1319),
    ],
)
def test_real_files(name: str, count: int, first_answer: str, num_solutions: int) -> None:
    loaded = load_problems(real(name), RAW, make_tokenizer(pieces=r"\S+|\s+"))
    assert len(loaded.problems) == count
    assert (loaded.num_skipped, loaded.num_duplicates) == (0, 0)
    assert loaded.problems[0].answer == first_answer
    assert sum(p.solution_tokens is not None for p in loaded.problems) == num_solutions
    assert not any("####" in p.answer or r"\boxed" in p.answer for p in loaded.problems)


def test_real_dapo_layout(tokenizer: Any) -> None:
    loaded = load_problems(real("dapo_aime24.parquet"), RAW, tokenizer)
    assert (len(loaded.problems), loaded.num_duplicates) == (30, 930)
    prompt, answer, solution = read(loaded, tokenizer)[0]
    assert prompt.startswith("Solve the following math problem step by step.")
    assert (answer, solution) == ("540", None)
    raw_problems = replace(real("dapo_aime24.parquet"), question="extra_info.raw_problem")
    bare = read(load_problems(raw_problems, RAW, tokenizer), tokenizer)[0][0]
    assert bare.startswith("Find the largest possible real part")
