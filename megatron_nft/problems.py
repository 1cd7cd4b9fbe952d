"""Questions with known answers: data files in every usual layout, made into tokenised `Problem`s.

Columns are found by their usual names unless `SourceConfig` names them; a dotted name reaches into
a nested column. Every error names the file and the row.
"""

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_nft.config import DataConfig, RuleConfig, SourceConfig
from megatron_nft.rollout.groups import Problem
from megatron_nft.rows import Row, RowError, excerpt, read_rows
from megatron_nft.templates import Message, PromptTemplate, template_of
from megatron_nft.verify.answers import last_boxed

QUESTION_COLUMNS = ("question", "problem", "prompt")
ANSWER_COLUMNS = (
    "answer",
    "final_answer",
    "reward_model.ground_truth",
    "ground_truth",
    "solution",
)
SOLUTION_COLUMNS = ("solution",)
MAX_BARE_ANSWER_CHARS = 200  # a longer `solution` without \boxed{} is prose, not an answer


@dataclass(frozen=True)
class LoadedProblems:
    """What a file held; `skipped_reasons` counts the rows left out, by reason."""

    problems: list[Problem]
    num_duplicates: int
    skipped_reasons: dict[str, int]

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped_reasons.values())


@dataclass(frozen=True)
class _Item:
    """One row, understood but not yet tokenised."""

    place: str
    question: str | list[Message]
    answer: str
    solution: str | None
    rule: RuleConfig


def load_problems(
    source: SourceConfig, data: DataConfig, tokenizer: Any, progress: bool = False
) -> LoadedProblems:
    """The problems of one file, tokenised, in the file's order and without repetitions.

    A prompt that the data gives as a chat carries its own instruction: it goes through the
    tokenizer's chat template as it is (template raw: its contents, plain). A problem's id depends
    only on the source's name, the question and the answer; copies that are kept count on, `id#1`.

    Raises ValueError for a file that is missing, empty, broken or of an unknown kind; for a row
    without usable question or answer, unless `data.on_bad_row` is skip; for a prompt longer than
    `data.max_prompt_tokens`, unless `data.on_long_prompt` is skip; and where nothing is left.
    """
    path, name = Path(source.path), source.name or Path(source.path).stem
    template = template_of(data.template)
    skipped: Counter[str] = Counter()
    rows = read_rows(path, _wanted_columns(source))
    rows = tqdm(rows, desc=path.name, unit=" rows", disable=not progress)
    items, num_duplicates = _by_identity(name, _items(path, rows, source, data, skipped), data)
    problems = []
    for batch in itertools.batched(items.items(), 1024):
        problems += _tokenize(path, name, batch, template, data, tokenizer, skipped)
    if not problems:
        raise ValueError(f"{path}: no problem left: {_summary(skipped)}")
    return LoadedProblems(problems, num_duplicates, dict(skipped))


def _wanted_columns(source: SourceConfig) -> set[str]:
    usual = (*QUESTION_COLUMNS, *ANSWER_COLUMNS, *SOLUTION_COLUMNS)
    columns = {*usual, source.question, source.answer, source.solution}
    return columns | {column.partition(".")[0] for column in columns}


def _by_identity(
    name: str, items: Iterable[_Item], data: DataConfig
) -> tuple[dict[str, _Item], int]:
    """The items by id, and how many were left out as repetitions."""
    kept: dict[str, _Item] = {}
    copies: Counter[str] = Counter()
    for item in items:
        content = json.dumps([name, item.question, item.answer], sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()[:16]
        if key not in kept:
            kept[key] = item
        else:
            copies[key] += 1
            if not data.deduplicate:
                kept[f"{key}#{copies[key]}"] = item
    return kept, copies.total() if data.deduplicate else 0


def _summary(skipped: Counter[str]) -> str:
    if not skipped:
        return "the file holds no rows"
    reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.most_common())
    return f"{skipped.total()} rows skipped ({reasons})"


def _items(
    path: Path, rows: Iterable[Row], source: SourceConfig, data: DataConfig, skipped: Counter[str]
) -> Iterator[_Item]:
    """The good rows; a bad one raises or is counted, as `data.on_bad_row` says."""
    for place, row in rows:
        try:
            item = _parse(place, row, source)
        except RowError as bad:
            if data.on_bad_row != "skip":
                raise ValueError(f"{path}, {place}: {bad}") from None
            skipped[bad.reason] += 1
        else:
            yield item


# Rows into items


def _parse(place: str, row: Any, source: SourceConfig) -> _Item:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError("not an object", f"the row was {excerpt(row)}; it must have named columns")
    column, value = _find(row, source.question, QUESTION_COLUMNS, "question")
    question = _chat(value, column) if isinstance(value, list) else _text(value, column, "question")
    column, value = _find(row, source.answer, ANSWER_COLUMNS, "answer")
    answer, worked = _split_answer(_answer_text(value, column), column)
    return _Item(place, question, answer, _solution(row, source, answer, worked), source.rule)


def _find(row: dict, given: str, usual: tuple[str, ...], what: str) -> tuple[str, Any]:
    """The first of the columns that is there, and its value, which may be None."""
    candidates = (given,) if given else usual
    for column in candidates:
        found, value = _lookup(row, column)
        if found:
            return column, value
    raise RowError(
        f"no {what} column",
        f"the columns are {', '.join(map(str, row)) or '(none)'}; looked for "
        f"{', '.join(candidates)}; the recipe may name another: `{what}: <column>`",
    )


def _lookup(row: dict, column: str) -> tuple[bool, Any]:
    if column in row:
        return True, row[column]
    value: Any = row
    for key in column.split("."):
        if not isinstance(value, dict) or key not in value:
            return False, None
        value = value[key]
    return True, value


def _text(value: Any, column: str, what: str) -> str:
    if value is None or value == "" or (isinstance(value, str) and value.isspace()):
        raise RowError(f"empty {what}", f"column {column!r} was {value!r}; it must hold text")
    if not isinstance(value, str):
        raise _wrong_type(value, column, what, "a string")
    if re.search("[\ud800-\udfff]", value):
        raise RowError(f"broken {what}", f"column {column!r} holds half a surrogate pair")
    return value


def _chat(messages: list, column: str) -> list[Message]:
    may_be = 'a string or messages like {"role": "user", "content": "…"}, the last the user\'s'
    if not messages:
        raise RowError("empty question", f"column {column!r} was []; it may be {may_be}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _wrong_type(message, column, "question", may_be)
    if messages[-1]["role"] != "user":
        raise RowError("wrong chat", f"the last role was {messages[-1]['role']!r}, not 'user'")
    return [
        {"role": m["role"], "content": _text(m.get("content"), f"{column}.content", "question")}
        for m in messages
    ]


def _answer_text(value: Any, column: str) -> str:
    """Text, a number (27.0 reads 27) or a list of those, which is joined with commas."""
    if isinstance(value, list) and value:
        return ", ".join(_answer_text(part, column) for part in value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None or isinstance(value, str) or value == []:
        return _text(value or None, column, "answer").strip()
    raise _wrong_type(value, column, "answer", "a string, a finite number or a list of those")


def _split_answer(text: str, column: str) -> tuple[str, str | None]:
    r"""The final answer, and the worked solution where the text is one.

    A worked solution ends in GSM8K's `#### 42` or holds its answer in its last \boxed{}.
    """
    worked, mark, answer = text.rpartition("####")
    boxed = last_boxed(text)
    if mark:
        answer = re.sub(r"(?<=\d),(?=\d{3})", "", answer.strip())
    elif boxed is not None:
        worked, answer = "" if text == rf"\boxed{{{boxed}}}" else text, boxed.strip()
    elif column.endswith("solution") and len(text) > MAX_BARE_ANSWER_CHARS:
        detail = f"column {column!r} has {len(text)} characters and neither \\boxed{{}} nor ####"
        raise RowError("solution without answer", detail)
    if not answer:
        raise RowError("empty answer", f"column {column!r} ended in {excerpt(text[-60:])}")
    return answer, worked.rstrip() or None


def _solution(row: dict, source: SourceConfig, answer: str, worked: str | None) -> str | None:
    """The worked solution: the given column, else the answer's own text, else the usual column."""
    if not source.solution and worked:
        return worked
    columns = (source.solution,) if source.solution else SOLUTION_COLUMNS
    if not source.solution and not any(_lookup(row, column)[0] for column in columns):
        return None
    column, value = _find(row, source.solution, columns, "solution")
    if isinstance(value, list) and value:  # OlympiadBench: several ways to one answer
        value = value[0]
    if value in (None, "", []) and not source.solution:
        return None
    solution = _text(value, column, "solution")
    return None if solution.strip() == answer and not source.solution else solution


def _wrong_type(value: Any, column: str, what: str, may_be: str) -> RowError:
    given = f"{type(value).__name__} {excerpt(value)}"
    return RowError(f"wrong type of {what}", f"column {column!r} was {given}; it may be {may_be}")


# Items into problems


def _tokenize(
    path: Path,
    name: str,
    batch: tuple[tuple[str, _Item], ...],
    template: PromptTemplate,
    data: DataConfig,
    tokenizer: Any,
    skipped: Counter[str],
) -> Iterator[Problem]:
    prompts = _prompt_tokens([item.question for _, item in batch], template, tokenizer)
    solutions = _solution_tokens([item.solution for _, item in batch], tokenizer)
    for (key, item), prompt, solution in zip(batch, prompts, solutions, strict=True):
        if len(prompt) <= data.max_prompt_tokens:
            yield Problem(key, prompt, item.answer, name, solution, item.rule)
        elif data.on_long_prompt == "skip":
            skipped["prompt too long"] += 1
        else:
            raise ValueError(
                f"{path}, {item.place}: the prompt has {len(prompt)} tokens, "
                f"data.max_prompt_tokens is {data.max_prompt_tokens}; "
                "raise it, or set data.on_long_prompt: skip"
            )


def _prompt_tokens(
    questions: list[str | list[Message]], template: PromptTemplate, tokenizer: Any
) -> list[np.ndarray]:
    """int32 [P] each; plain text gets the tokenizer's BOS, a chat template writes its own."""
    texts, leads = [], []
    bos = tokenizer("")["input_ids"]
    for question in questions:
        messages = template.messages(question)
        texts.append(_lay_out(messages, tokenizer) if messages else template.plain(question))
        leads.append([] if messages else bos)
    tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [np.array(lead + t, np.int32) for lead, t in zip(leads, tokens, strict=True)]


def _lay_out(messages: list[Message], tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, which this data or "
            "data.template needs; data.template may be raw or, for plain questions, boxed"
        )
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _solution_tokens(solutions: list[str | None], tokenizer: Any) -> list[np.ndarray | None]:
    """int32 [T] each, ends with the tokenizer's end-of-text token; None where there is none."""
    if not any(solutions):
        return [None] * len(solutions)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token")
    tokens = tokenizer([text or "" for text in solutions], add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return [
        np.array([*t, end], np.int32) if text else None
        for text, t in zip(solutions, tokens, strict=True)
    ]
