"""What sampling leaves in a checkpoint comes back as it was."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_collect import Sampler, group, problem, tally_of

from megatron_nft.rollout import saving
from megatron_nft.rollout.collect import Batch
from megatron_nft.rollout.groups import Group, Response
from megatron_nft.rollout.records import read_groups, write_groups

PROBLEMS = {str(n): problem(n) for n in range(100)}


def random_group(number: int, version: int) -> Group:
    """A group with log-probabilities of every kind, and an answer without tokens."""
    rng = np.random.default_rng(number)
    answers = [
        Response(
            tokens=rng.integers(0, 2**31, n).astype(np.int32),
            logp=np.append(rng.normal(size=max(n - 1, 0)), [-0.0] * (n > 0)).astype(np.float32),
            finish=r.finish,
            text="",
            seed=2**32 + n,
            version=version,
            verdict=r.verdict,
        )
        for n, r in enumerate(group(number, "+-?-").responses)
    ]
    return Group(problem(number), tuple(answers))


def same(a: list[Group], b: list[Group]) -> bool:
    def whole(groups: list[Group]) -> list:
        return [
            (g.problem.id, replace(r, tokens=r.tokens.tobytes(), logp=r.logp.tobytes()))
            for g in groups
            for r in g.responses
        ]

    return whole(a) == whole(b) and [g.version for g in a] == [g.version for g in b]


def test_groups_come_back_bit_for_bit(tmp_path: Path) -> None:
    groups = [random_group(n, version=n % 3) for n in (5, 5, 1, 7)]  # one problem twice in a row
    write_groups(tmp_path / "groups.parquet", groups)
    found = read_groups(tmp_path / "groups.parquet", PROBLEMS)
    assert same(found, groups)
    assert len(found) == 4
    assert found[0].responses[1].tokens.dtype == np.int32


def test_no_groups_are_a_file_too(tmp_path: Path) -> None:
    write_groups(tmp_path / "groups.parquet", [])
    assert read_groups(tmp_path / "groups.parquet", PROBLEMS) == []


def test_a_problem_that_is_gone_is_named(tmp_path: Path) -> None:
    write_groups(tmp_path / "groups.parquet", [random_group(3, 0)])
    with pytest.raises(ValueError, match="no problem '3' any more"):
        read_groups(tmp_path / "groups.parquet", {})


def test_a_collector_goes_on_as_if_it_had_not_been_saved(tmp_path: Path) -> None:
    options = {"questions": 5, "questions_asked": 0, "cut": 2}
    through, resumed = (Sampler("+-+-", "++++", "+---", **options) for _ in range(2))
    through.batch()
    ahead = {3: Batch([random_group(n, 2) for n in range(4)], tally_of([group(8, "+-?-")]))}
    assert through.collector.surplus
    assert through.collector.cut
    saving.save(tmp_path, through.collector, ahead)
    found = saving.load(tmp_path, resumed.collector, PROBLEMS)
    resumed.collector._order.position = through.collector._order.position
    assert found.keys() == {3}
    assert same(found[3].groups, ahead[3].groups)
    assert found[3].tally == ahead[3].tally
    for _ in range(4):
        expected, tally = through.batch()
        assert resumed.batch() == (expected, tally)
        assert resumed.asked == through.asked
