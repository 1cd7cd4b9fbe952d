"""New directories: there when they are complete, and nothing else is touched."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints_conversion.output import SPARE_BYTES, check_free, new_directory


def names(path: Path) -> set[str]:
    return {inside.name for inside in path.iterdir()}


def test_it_has_its_name_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with new_directory(out) as partial:
        (partial / "file").write_text("new")
        assert not out.exists()
    assert names(out) == {"file"}
    assert names(out.parent) == {"out"}


def test_an_earlier_one_is_replaced_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "file").write_text("earlier")
    with new_directory(out, replaces=True) as partial:
        (partial / "new").touch()
        assert (out / "deep" / "file").read_text() == "earlier"
    assert names(out) == {"new"}
    assert names(tmp_path) == {"out"}


def test_what_a_link_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    for _ in range(2):
        with new_directory(tmp_path / "out", replaces=True) as partial:
            (partial / "new").touch()
        assert (tmp_path / "out").is_symlink()
        assert names(tmp_path / "out") == {"new"}
        assert names(tmp_path / "disk") == {"real"}


def appear(out: Path) -> None:
    with new_directory(out):
        out.mkdir()
        (out / "thesis").touch()


def test_what_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="out appeared meanwhile; it was left alone"):
        appear(out)
    assert names(out) == {"thesis"}
    assert names(tmp_path) == {"out"}


def fail(out: Path, error: BaseException) -> None:
    with new_directory(out, replaces=True) as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "new").touch()
        raise error


@pytest.mark.parametrize("error", [RuntimeError("why"), KeyboardInterrupt(), OSError(28, "full")])
def test_a_failure_leaves_everything_as_it_was(tmp_path: Path, error: BaseException) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("earlier")
    expected = ValueError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        fail(out, error)
    assert names(tmp_path) == {"out"}
    assert (out / "file").read_text() == "earlier"


def test_an_error_of_the_file_system_names_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"out\.partial/no/file: No such file or directory"),
        new_directory(tmp_path / "out") as partial,
    ):
        (partial / "no" / "file").touch()
    assert names(tmp_path) == set()


def test_what_was_killed_is_removed(tmp_path: Path) -> None:
    leftover = tmp_path / "out.partial"
    (leftover / "deep").mkdir(parents=True)
    (leftover / "deep" / "file").touch()
    (leftover / "stale").touch()
    (leftover / ".lock").touch()  # as conversions leave it
    with new_directory(tmp_path / "out") as partial:
        assert names(partial) == {".lock"}
        (partial / "new").touch()
    assert names(tmp_path / "out") == {"new"}
    assert names(tmp_path) == {"out"}


def test_names_beside_it_are_anybodys(tmp_path: Path) -> None:
    others = {"out.old", "out.bak", "out.replaced", "out2"}
    for name in others:
        (tmp_path / name).mkdir()
    for _ in range(2):
        with new_directory(tmp_path / "out", replaces=True):
            pass
    assert names(tmp_path) == {"out", *others}


def test_what_another_program_left_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis").touch()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / ".lock").touch()
    (tmp_path / "other.partial").symlink_to(tmp_path / "precious")
    for name in ("out", "other"):
        with pytest.raises(ValueError, match=rf"{name}\.partial is in the way"):
            new_directory(tmp_path / name).__enter__()
    assert names(tmp_path / "out.partial") == {"thesis"}
    assert names(tmp_path / "precious") == {".lock"}


def test_a_second_writer_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_directory(out) as partial:
        (partial / "file").touch()
        second = new_directory(out)
        with pytest.raises(ValueError, match=r"out\.partial: another process is writing it"):
            second.__enter__()
        assert (partial / "file").exists()
    assert names(out) == {"file"}


@pytest.mark.parametrize("ends", [shutil.rmtree, lambda partial: partial.rename("out")])
def test_a_writer_that_ends_while_a_second_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: object
) -> None:
    """Between the opening of the lock and its being locked, its directory can be gone."""
    monkeypatch.chdir(tmp_path)
    flock = fcntl.flock

    def late(lock: int, operation: int) -> None:
        ends(Path("out.partial"))
        flock(lock, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ValueError, match="another process is writing it"):
        new_directory(Path("out")).__enter__()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(lock: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with new_directory(tmp_path / "out") as partial:
        (partial / "new").touch()
    assert names(tmp_path / "out") == {"new"}


def test_a_parent_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    check_free(out, 1)
    with pytest.raises(ValueError, match=r"file/out\.partial: cannot be made: Not a directory"):
        new_directory(out).__enter__()


@pytest.fixture
def unwritable() -> Iterator[Path]:
    """A directory of root's, for this process as another user; or a read-only one of ours."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield path
    os.seteuid(user)
    path.rmdir()


def test_a_parent_that_is_not_writable(unwritable: Path) -> None:
    with pytest.raises(ValueError, match=r"out\.partial: cannot be made: Permission denied"):
        new_directory(unwritable / "out").__enter__()


# room


def test_an_existing_directory_is_not_free(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    for out in (tmp_path, tmp_path / "dangling"):
        with pytest.raises(ValueError, match=f"--out: {out} exists; give a new directory"):
            check_free(out, 1)


def test_a_disk_without_room(tmp_path: Path) -> None:
    out = tmp_path / "not" / "there" / "out"
    free = shutil.disk_usage(tmp_path).free
    check_free(out, free // 2 - SPARE_BYTES)
    with pytest.raises(ValueError, match=rf"--out: {tmp_path} has .* GB free, and out needs"):
        check_free(out, 2 * free)
