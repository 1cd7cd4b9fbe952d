"""Checkpoints: written whole or not at all, checked when they are read, resumed at any layout.

Processes cost far more than what they do here: one launch makes all that the tests compare.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from checkpoints import (
    MOVES,
    STATE,
    contents,
    everything,
    flip_a_bit,
    names_in,
    small_file_system,
)
from processes import run
from reference import Tensors, distance
from toys import save_qwen2, save_tokenizer

from checkpoints_conversion.convert import megatron_to_hf
from megatron_nft.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    SourceConfig,
)
from megatron_nft.metrics import read_metrics
from megatron_nft.policy import checkpoint
from megatron_nft.policy import checkpoint_files as files
from megatron_nft.policy.checkpoint import RunState
from megatron_nft.validation import validate


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    save_tokenizer(save_qwen2(root / "model", num_hidden_layers=4))
    rows = [{"question": f"{i}A1", "answer": str(i + 1), "solution": str(i + 1)} for i in range(8)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def done(root: Path) -> list[dict[str, Any]]:
    """What both processes found."""
    with small_file_system(root / "disk") as disk:
        found = run(everything, 2, root, disk)
        if disk:
            shutil.copytree(disk / "run", root / "small disk")
    return found


@pytest.fixture
def two(root: Path, done: list[dict[str, Any]], tmp_path: Path) -> Iterator[Path]:
    """Two real checkpoints, to be damaged, and a world of one process to look at them in."""
    shutil.copytree(root / "twice", tmp_path / "two")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield tmp_path / "two"
    dist.destroy_process_group()


# resuming


def assert_same_step(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    assert distance(ours["weights"], theirs["weights"]) <= 1e-5


@pytest.mark.processes
@pytest.mark.parametrize(("source", "target"), MOVES, ids=["→".join(m) for m in MOVES])
def test_a_run_goes_on_at_another_layout(
    done: list[dict[str, Any]], source: str, target: str
) -> None:
    """Row 5 of the field's failures: moments dropped, the loop at 0 again, log-probabilities off.

    The next step depends on the moments and their step; without them it would be another.
    """
    state, step = done[0]["resumed"][source, target]
    assert state == STATE
    assert_same_step(step, done[0]["through"][source])


@pytest.mark.processes
def test_the_second_save_is_another_and_both_can_be_resumed(done: list[dict[str, Any]]) -> None:
    """Row 4 of the field's failures: a later save rewrote the first one's tensors."""
    twice = done[0]["twice"]
    for saved, loaded in zip(twice["saved"], twice["loaded"], strict=True):
        assert saved.keys() == loaded.keys()
        assert all(np.array_equal(saved[name], loaded[name]) for name in saved)
    first, second = twice["saved"]
    assert distance(first, second) > 1e-4


@pytest.mark.processes
def test_replicas_share_the_writing(root: Path, done: list[dict[str, Any]]) -> None:
    path = root / "saved" / "DP2" / "rollout_1"
    sizes = [sum(f.stat().st_size for f in path.glob(f"__{rank}_*.distcp")) for rank in (0, 1)]
    assert 0.4 < sizes[0] / sum(sizes) < 0.6


@pytest.mark.processes
def test_a_run_can_be_saved_before_its_first_step(done: list[dict[str, Any]]) -> None:
    assert_same_step(done[0]["first step, resumed"], done[0]["first step"])


@pytest.mark.processes
def test_a_checkpoint_converts(root: Path, done: list[dict[str, Any]], tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    megatron_to_hf(root / "twice" / "rollout_2", tmp_path / "hf")
    exported: Tensors = load_file(tmp_path / "hf" / "model.safetensors")
    saved = done[0]["twice"]["saved"][1]
    assert exported.keys() == saved.keys()
    assert all(np.array_equal(exported[name], saved[name]) for name in saved)
    shutil.copytree(root / "twice" / "rollout_2", tmp_path / "rollout_3.partial")
    (tmp_path / "rollout_3.partial" / "metadata.json").unlink()
    with pytest.raises(ValueError, match=r"rollout_3\.partial.*incomplete"):
        megatron_to_hf(tmp_path / "rollout_3.partial", tmp_path / "none")


# damage


@pytest.mark.processes
def test_the_marker_lists_all_files(two: Path) -> None:
    path = two / "rollout_2"
    marker = json.loads((path / "complete.json").read_text())
    found = {name: file["crc32"] for name, file in marker["files"].items()}
    assert found == {n: c for n, c in contents(path).items() if n != "complete.json"}
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json"} <= found.keys()
    assert "hf/config.json" in found


def edit_marker(path: Path, edit: Callable[[str], str]) -> None:
    marker = path / "complete.json"
    marker.write_text(edit(marker.read_text()))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no marker": (lambda p: (p / "complete.json").unlink(), "complete.json is missing"),
    "a torn marker": (lambda p: edit_marker(p, lambda t: t[:40]), "complete.json cannot be read"),
    "no JSON object": (lambda p: edit_marker(p, lambda _: "[]"), "complete.json cannot be read"),
    "another position": (
        lambda p: edit_marker(p, lambda t: t.replace('"position": 0', '"position": 8')),
        "complete.json cannot be read: it has other bytes",
    ),
    "a missing shard": (lambda p: (p / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
    "a truncated shard": (
        lambda p: os.truncate(p / "__0_0.distcp", 1000),
        "__0_0.distcp has 1000 bytes, and",
    ),
    "a flipped bit": (
        lambda p: flip_a_bit(p / "__0_0.distcp"),
        "__0_0.distcp has other bytes than were written",
    ),
    "another index": (lambda p: flip_a_bit(p / ".metadata"), ".metadata has other bytes"),
    "another configuration": (
        lambda p: (p / "hf" / "config.json").write_text("{}"),
        "hf/config.json has 2 bytes, and",
    ),
}


@pytest.mark.processes
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_kept(
    two: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    inflict, words = DAMAGES[damage]
    inflict(two / "rollout_2")
    before = contents(two / "rollout_2"), contents(two / "rollout_1")
    assert checkpoint.latest(two) == (two / "rollout_1", RunState(rollout=1))
    [error] = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert str(two / "rollout_2") in error
    assert words in error
    assert (contents(two / "rollout_2.damaged"), contents(two / "rollout_1")) == before
    caplog.clear()
    assert checkpoint.latest(two)[1].rollout == 1
    assert not caplog.records  # it is said once


@pytest.mark.processes
def test_a_checkpoint_of_another_version_is_no_damaged_one(two: Path) -> None:
    edit_marker(two / "rollout_2", lambda _: '{"state": {"rollout": 2, "phase": 3}}')
    with pytest.raises(ValueError, match=r"rollout_2 is of another version.*its state has phase"):
        checkpoint.latest(two)
    assert names_in(two) == ["rollout_1", "rollout_2"]


@pytest.mark.processes
def test_a_run_never_begins_anew_because_all_is_damaged(two: Path) -> None:
    for rollout in (1, 2):
        flip_a_bit(two / f"rollout_{rollout}" / "__0_0.distcp")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"all checkpoints.*damaged.*restore") as raised:
            checkpoint.latest(two)
        assert all(str(two / f"rollout_{n}: __0_0.distcp") in str(raised.value) for n in (1, 2))
    assert names_in(two) == ["rollout_1", "rollout_2"]
    shutil.rmtree(two / "rollout_1")
    (two / "rollout_2").rename(two / "rollout_2.damaged")
    with pytest.raises(ValueError, match=r"rollout_2\.damaged"):
        checkpoint.latest(two)


@pytest.mark.processes
def test_nothing_is_found_where_nothing_was_ever_complete(two: Path, tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "none") is None
    (tmp_path / "begun" / "rollout_1.partial").mkdir(parents=True)
    assert checkpoint.latest(tmp_path / "begun") is None


@pytest.mark.processes
def test_a_checkpoint_of_before_files_were_listed(
    two: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {"rollout": 2, "step": 8, "position": 6, "accuracy": 0.5}
    edit_marker(two / "rollout_2", lambda _: json.dumps({"state": state, "parallel": {}}))
    assert checkpoint.latest(two) == (two / "rollout_2", RunState(2, 8, 6, 0.5))
    [warning] = caplog.records
    assert "not checked" in warning.getMessage()


@pytest.mark.processes
def test_a_kill_between_marker_and_name_loses_nothing(two: Path) -> None:
    (two / "rollout_2").rename(two / "rollout_2.partial")
    shutil.copytree(two / "rollout_1", two / "rollout_2.old")  # it was to replace
    assert checkpoint.latest(two) == (two / "rollout_2", RunState(rollout=2))


@pytest.mark.processes
def test_a_damaged_checkpoint_is_written_anew(done: list[dict[str, Any]]) -> None:
    both, aside = ["rollout_1", "rollout_2"], ["rollout_1", "rollout_2.damaged"]
    for found in done:  # the ranks agree
        assert found["anew"] == ["rollout_1", 1, aside, both, 2]


# a full disk


@pytest.mark.processes
def test_a_rank_that_cannot_write_fails_the_save_for_all(done: list[dict[str, Any]]) -> None:
    found = [one["failing"] for one in done]
    assert found[0]["errors"] == found[1]["errors"]
    files_named = {
        "shard of rank 0": "__0_0",
        "shard of rank 1": "__1_0",
        "index": "File too large",
    }
    for what, word in files_named.items():
        error = found[0]["errors"][what]
        assert word in error
        assert "File too large" in error
        assert "bytes were free" in error
        assert "lower checkpoint.keep" in error
    for one in found:
        assert one["untouched"]  # the earlier rollout_2 too, and nothing partial is left
        assert one["then"][1].step == 9


@pytest.mark.processes
def test_a_full_disk_fails_the_save_and_nothing_else(
    root: Path, done: list[dict[str, Any]]
) -> None:
    shards = (root / "failing" / "rollout_1").glob("*.distcp")  # of the same model and layout
    shard_bytes = sum(path.stat().st_size for path in shards)
    for found in (one["disk"] for one in done):
        if found is None:
            pytest.skip("a tmpfs of a few MB can be mounted by root alone")
        assert all("No space left" in error for error in found["errors"].values())
        needed = int(re.search(r"(\d+) bytes are needed", found["errors"]["beforehand"])[1])
        assert 1.0 < needed / shard_bytes < 1.3
        assert "(0 bytes were free)" in found["errors"]["meanwhile"]
        for error in found["errors"].values():
            assert "rollout_2 was not saved" in error
            assert "rollout_7.partial can go" in error
        assert found["untouched"]
        assert found["names"] == ["rollout_1", "rollout_7.partial"]
        assert found["then"] == ["rollout_2"]  # a kill's leftovers go at the next success


@pytest.mark.processes
def test_a_run_outlives_a_full_disk(root: Path, done: list[dict[str, Any]]) -> None:
    if done[0]["disk"] is None:
        pytest.skip("a tmpfs of a few MB can be mounted by root alone")
    # each record is written before its checkpoint
    records = read_metrics(root / "small disk")
    assert [r["checkpoints_failed"] for r in records] == [0, 0, 1]
    assert names_in(root / "small disk" / "checkpoints") == ["rollout_1"]
    assert (root / "small disk" / "hf" / "model.safetensors").is_file()


# the best


@pytest.mark.processes
def test_the_best_checkpoint_stays_and_is_linked_to(done: list[dict[str, Any]]) -> None:
    """Of every second rollout's evaluation; between them nothing is known of a checkpoint."""
    found = done[0]["best"]
    assert {rollout: (names, target) for rollout, (names, target, _) in found.items()} == {
        1: (["rollout_1"], ""),
        2: (["rollout_2"], "rollout_2"),
        3: (["rollout_2", "rollout_3"], "rollout_2"),
        4: (["rollout_2", "rollout_4"], "rollout_2"),
        5: (["rollout_2", "rollout_5"], "rollout_2"),
        6: (["rollout_6"], "rollout_6"),
    }
    best = {r: (s.best_metric, s.best_value, s.best_rollout) for r, (_, _, s) in found.items()}
    assert best[5] == ("eval/sums/accuracy", 0.6, 2)
    assert best[6] == ("eval/sums/accuracy", 0.7, 6)


def test_the_best_is_what_the_metric_says_of_checkpoints_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "rollout_2").mkdir()
    state = RunState(rollout=4, best_metric="accuracy", best_value=0.5, best_rollout=2)
    better = replace(state, best_value=0.6, best_rollout=4)
    none = RunState(rollout=4)

    def best(metric: str, value: float | None) -> RunState:
        return checkpoint.with_best(tmp_path, state, metric, value)

    assert best("accuracy", 0.6) == better
    assert best("accuracy", 0.5) == state  # the earlier of equals
    assert best("accuracy", None) == state
    assert best("accuracy", float("nan")) == state
    assert best("", 0.9) == none
    other = "eval/other/accuracy"
    assert best(other, 0.1) == replace(none, best_metric=other, best_value=0.1, best_rollout=4)
    (tmp_path / "rollout_2").rmdir()
    assert best("accuracy", 0.1) == replace(better, best_value=0.1)


def test_the_link_to_the_best_is_relative_and_goes_with_it(tmp_path: Path) -> None:
    for rollout in (3, 12):
        (tmp_path / f"rollout_{rollout}").mkdir()
        files.link_best(tmp_path, rollout)
        assert os.readlink(tmp_path / "best") == f"rollout_{rollout}"
    files.link_best(tmp_path, 0)
    assert names_in(tmp_path) == ["rollout_12", "rollout_3"]


@pytest.mark.parametrize(
    ("best", "evaluate", "words"),
    [
        ("aime24", {}, "may be empty, accuracy, eval/aime24/accuracy, eval/math/accuracy"),
        ("eval/aime25/accuracy", {}, "checkpoint.best was 'eval/aime25/accuracy'"),
        ("accuracy", {"every": 0}, "evaluate.every above 0"),
        ("accuracy", {"sets": []}, "needs evaluate.sets"),
    ],
)
def test_the_best_is_by_a_metric_that_there_is(
    best: str, evaluate: dict[str, Any], words: str
) -> None:
    sets = [SourceConfig(path="aime24.jsonl"), SourceConfig(path="b.jsonl", name="math")]
    config = Config(
        run_dir="run",
        model=ModelConfig(path="model"),
        data=DataConfig(train=[SourceConfig(path="train.jsonl")]),
        evaluate=EvaluateConfig(sets=sets),
    )
    for good in ("", "accuracy", "eval/aime24/accuracy", "eval/math/accuracy"):
        validate(replace(config, checkpoint=CheckpointConfig(best=good)))
    bad = replace(config.evaluate, **evaluate)
    with pytest.raises(ValueError, match=words):
        validate(replace(config, checkpoint=CheckpointConfig(best=best), evaluate=bad))
