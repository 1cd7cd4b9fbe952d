"""Data files as rows: JSON lines (.jsonl), one JSON list (.json) and parquet (.parquet), streamed.

A place is what an error calls a row: `line 3` of .jsonl, `item 3` of .json, `row 3` of .parquet,
counted from 1.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

Row = tuple[str, Any]  # its place, and its columns or the RowError it is


class RowError(ValueError):
    """A row that holds no problem: the reason, under which it is counted, and what was there."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def read_rows(path: Path, wanted: set[str]) -> Iterator[Row]:
    """Every row of the file with its place; of parquet only the `wanted` columns are read.

    A line that cannot be read is yielded as a RowError. Raises ValueError, naming the file, where
    the file itself is at fault: missing, empty, of an unknown kind, or broken beyond its rows.
    """
    readers = {".jsonl": _json_lines, ".json": _json_list, ".parquet": _parquet}
    if path.suffix not in readers:
        raise ValueError(f"{path}: the suffix was {path.suffix!r}; it may be {', '.join(readers)}")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file (looked for {path.absolute()})")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    return _parquet(path, wanted) if path.suffix == ".parquet" else readers[path.suffix](path)


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", _json_row(line)


def _json_row(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RowError("not UTF-8", f"{error.reason} at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return RowError("malformed JSON", f"{error}; the line was {excerpt(line.decode())}")


def _json_list(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        hint = "; a file with one object a line must be named .jsonl"
        raise ValueError(f"{path}: malformed JSON: {error}{hint}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: held {type(rows).__name__}; it must be a list of objects")
    for number, row in enumerate(rows, 1):
        yield f"item {number}", row


def _parquet(path: Path, wanted: set[str]) -> Iterator[Row]:
    """A few thousand rows are in memory at a time; the columns not wanted are there, but None."""
    num_read = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            unread = dict.fromkeys(file.schema_arrow.names)  # so that errors list every column
            columns = [column for column in unread if column in wanted]
            for batch in file.iter_batches(batch_size=4096, columns=columns):
                for number, row in enumerate(batch.to_pylist(), num_read + 1):
                    yield f"row {number}", unread | row
                num_read += batch.num_rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        where = f"after row {num_read}" if num_read else "at its start"
        raise ValueError(f"{path}: broken or truncated parquet, {where}: {error}") from None


def excerpt(value: Any) -> str:
    """The beginning of a value, for an error."""
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
