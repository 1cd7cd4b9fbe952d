"""A directory of checkpoints: what is kept, named and described."""

import zlib
from dataclasses import asdict
from pathlib import Path

import pytest
from checkpoints import names_in

from megatron_nft.policy import checkpoint_files as files


def test_what_is_kept(tmp_path: Path) -> None:
    for name in ("rollout_2", "rollout_8", "rollout_9", "rollout_10", "rollout_3.damaged"):
        (tmp_path / name).mkdir()
    for name in ("rollout_10.damaged", "rollout_4.partial", "rollout_9.old"):
        (tmp_path / name).mkdir()
    newest, best = tmp_path / "rollout_10", tmp_path / "rollout_2"
    files.prune(tmp_path, 2, newest, best)
    kept = ["rollout_10", "rollout_2", "rollout_3.damaged", "rollout_9"]
    assert names_in(tmp_path) == kept


def test_a_directory_that_cannot_have_its_name_leaves_the_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "rollout_1").mkdir()
    (tmp_path / "rollout_1" / "file").write_text("earlier")
    with pytest.raises(FileNotFoundError):
        files.publish(tmp_path / "rollout_1.partial", tmp_path / "rollout_1")
    assert (tmp_path / "rollout_1" / "file").read_text() == "earlier"


def test_a_files_description(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 70_000)  # more than one piece
    expected = {"bytes": 17_920_000, "crc32": zlib.crc32(bytes(range(256)) * 70_000)}
    assert asdict(files.describe(tmp_path / "file")) == expected
