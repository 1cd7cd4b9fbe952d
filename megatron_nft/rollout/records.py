"""Sampled groups in a file: a row an answer, its tokens, log-probabilities, seed and version."""

import logging
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_nft.policy.packing import Sequence
from megatron_nft.rollout.groups import Group, Problem, Response, Verdict

SCHEMA = pa.schema(
    {
        "group": pa.int32(),  # rows of one group have one number
        "problem": pa.string(),
        "tokens": pa.list_(pa.int32()),
        "logp": pa.list_(pa.float32()),
        "finish": pa.string(),
        "seed": pa.int64(),
        "version": pa.int32(),
        "verdict": pa.string(),
    }
)


logger = logging.getLogger(__name__)


def keep(path: Path, write: Callable[[Path], None]) -> bool:
    """Write a file that no run depends on, whole or not at all; False, and a word, if it cannot."""
    unfinished = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(unfinished)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        logger.error("%s was not written: %s; the run goes on", path, error)
        return False
    return True


def write_groups(path: Path, groups: Iterable[Group]) -> None:
    """Write judged groups as parquet; texts are left out, as the tokens say them."""
    rows = [_row(n, g.problem, r) for n, g in enumerate(groups) for r in g.responses]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path)


def read_groups(path: Path, problems: Mapping[str, Problem]) -> list[Group]:
    """What write_groups wrote, bit for bit; problems are found by their id.

    Raises:
        ValueError: a problem that there is no more.
    """
    rows = pq.read_table(path, schema=SCHEMA).to_pylist()
    if gone := {row["problem"] for row in rows} - problems.keys():
        raise ValueError(f"{path}: the data has no problem {sorted(gone)[0]!r} any more")
    return [
        Group(problems[key[1]], tuple(map(_response, answers)))
        for key, answers in groupby(rows, key=lambda row: (row["group"], row["problem"]))
    ]


def write_sequences(path: Path, sequences: Iterable[Sequence]) -> None:
    """Write what a step was to train on as parquet, a row a sequence."""
    pq.write_table(pa.Table.from_pylist([vars(s) for s in sequences]), path)


def _row(number: int, problem: Problem, response: Response) -> dict[str, Any]:
    assert response.verdict is not None, "only judged answers are kept"
    return {
        "group": number,
        "problem": problem.id,
        "tokens": response.tokens,
        "logp": response.logp,
        "finish": response.finish,
        "seed": response.seed,
        "version": response.version,
        "verdict": response.verdict.value,
    }


def _response(row: dict[str, Any]) -> Response:
    return Response(
        tokens=np.array(row["tokens"], np.int32),
        logp=np.array(row["logp"], np.float32),
        finish=row["finish"],
        text="",
        seed=row["seed"],
        version=row["version"],
        verdict=Verdict(row["verdict"]),
    )
