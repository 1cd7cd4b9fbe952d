"""What sampling leaves behind in a checkpoint, so that a resumed run goes on as if never stopped.

Beside the position in the data: what was learned of the questions, groups that had no place in a
batch yet, questions that were cut off, and batches that were sampled ahead.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_nft.rollout.collect import Batch, Collector
from megatron_nft.rollout.groups import Problem, Verdict
from megatron_nft.rollout.questions import Experience
from megatron_nft.rollout.records import read_groups, write_groups
from megatron_nft.rollout.tally import Tally

FOLDER, STATE, SURPLUS = "sampling", "state.json", "surplus.parquet"


def save(checkpoint: Path, collector: Collector, ahead: Mapping[int, Batch]) -> None:
    """Write a folder into a checkpoint that is not complete yet.

    Args:
        ahead: batches that were sampled and not trained on, by rollout.
    """
    folder = checkpoint / FOLDER
    folder.mkdir()
    state = {
        "experience": asdict(collector.experience),
        "cut": [problem.id for problem in collector.cut],
        "ahead": {rollout: _tally_to_json(batch.tally) for rollout, batch in ahead.items()},
    }
    (folder / STATE).write_text(json.dumps(state))
    write_groups(folder / SURPLUS, collector.surplus)
    for rollout, batch in ahead.items():
        write_groups(_batch_file(folder, rollout), batch.groups)


def load(
    checkpoint: Path, collector: Collector, problems: Mapping[str, Problem]
) -> dict[int, Batch]:
    """Give the collector what it had left; the batches that were sampled ahead.

    Raises:
        ValueError: the data lacks a problem that it had.
    """
    folder = checkpoint / FOLDER
    state = json.loads((folder / STATE).read_text())
    if gone := set(state["cut"]) - problems.keys():
        raise ValueError(f"{folder}: the data has no problem {sorted(gone)[0]!r} any more")
    collector.experience = Experience(**state["experience"])
    collector.cut = [problems[name] for name in state["cut"]]
    collector.surplus = read_groups(folder / SURPLUS, problems)
    return {
        int(rollout): Batch(
            read_groups(_batch_file(folder, int(rollout)), problems), _tally_of_json(tally)
        )
        for rollout, tally in state["ahead"].items()
    }


def _batch_file(folder: Path, rollout: int) -> Path:
    return folder / f"ahead_{rollout}.parquet"


def _tally_to_json(tally: Tally) -> dict[str, Any]:
    state = {
        name: dict(value) if isinstance(value, Counter) else value
        for name, value in vars(tally).items()
    }
    state["verdicts"] = {verdict.value: n for verdict, n in tally.verdicts.items()}
    state["accuracies"] = list(tally.accuracies.items())  # the keys are numbers
    return state


def _tally_of_json(state: dict[str, Any]) -> Tally:
    verdicts = Counter({Verdict(name): n for name, n in state["verdicts"].items()})
    counters = {name: Counter(state[name]) for name in ("finishes", "failures")}
    accuracies = Counter(dict(map(tuple, state["accuracies"])))
    return Tally(**state | counters | {"verdicts": verdicts, "accuracies": accuracies})
