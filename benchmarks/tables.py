"""Markdown tables, a row at a time or all at once."""

from collections.abc import Sequence
from typing import Any


def head(columns: Sequence[str]) -> str:
    """The first two lines; a column of names, and figures to its right."""
    names = row([column.replace("|", "\\|") for column in columns])
    return f"{names}\n|---|{'---:|' * (len(columns) - 1)}"


def row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return "\n".join([head(columns), *map(row, rows)])
