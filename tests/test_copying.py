"""Tensors copied by rows: every row once, and nothing that is not finite unseen."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints_conversion import copying
from checkpoints_conversion.copying import NonFiniteError, copy, is_finite, pieces
from checkpoints_conversion.safetensors_file import Place, read_places
from checkpoints_conversion.source import File, Info

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


class OneFile:
    """A `Source`: the tensors of one safetensors file."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, path)
        self._places: dict[str, Place] = read_places(path)
        self.infos = {name: place.info for name, place in self._places.items()}
        self._file = File(path)

    def read(self, name: str, start: int, out: Tensor) -> None:
        place = self._places[name]
        self._file.read(place.offset + start * place.info.row_bytes, out)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"wide": (3, 500), "tall": (300, 5), "flat": (77,), "one": (1, 1)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def copied(path: Path, tensors: dict[str, Tensor], **options: int | bool) -> list[str]:
    """Copy everything, and look whether it is everything; the names that are not finite."""
    source = OneFile(path / "file.safetensors", tensors)
    out = {name: torch.full_like(tensor, 7.0) for name, tensor in tensors.items()}
    times = {name: torch.zeros(len(tensor)) for name, tensor in tensors.items()}

    def write(name: str, start: int, rows: Tensor) -> None:
        out[name][start : start + len(rows)] = rows
        times[name][start : start + len(rows)] += 1

    found = copy(source, write, title="", **{"workers": 2} | options)
    for name, tensor in tensors.items():
        assert out[name].view(torch.uint8).equal(tensor.view(torch.uint8)), name
        assert (times[name] == 1).all(), name
    return found


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("piece_bytes", [1, 100, 2000, 8 << 20])
def test_every_row_is_copied_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tensors: dict[str, Tensor],
    workers: int,
    piece_bytes: int,
) -> None:
    monkeypatch.setattr(copying, "PIECE_BYTES", piece_bytes)
    assert copied(tmp_path, tensors, workers=workers) == []


@pytest.mark.parametrize("multiple", [1, 128])
def test_pieces_are_of_a_size_and_a_multiple(
    multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "PIECE_BYTES", 3000)
    infos = {"a": Info((1000, 4), torch.float32), "b": Info((300, 1000), torch.bfloat16)}
    for name, info in infos.items():
        found = [piece for piece in pieces(infos, multiple) if piece.name == name]
        assert [piece.start for piece in found] == [0, *(piece.stop for piece in found[:-1])]
        assert found[-1].stop == info.shape[0]
        heights = {piece.stop - piece.start for piece in found[:-1]}
        assert len(heights) == 1
        assert heights.pop() % multiple == 0
    first = next(pieces(infos))
    assert 3000 - first.info.row_bytes < (first.stop - first.start) * first.info.row_bytes <= 3000


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_number_that_is_not_finite_is_found(dtype: torch.dtype, bad: float) -> None:
    rows = torch.full((7, 33), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(rows)
    assert is_finite(-rows)
    for place in (0, 100, rows.numel() - 1):
        spoiled = rows.clone()
        spoiled.view(-1)[place] = bad
        assert not is_finite(spoiled)


def test_tensors_that_are_not_finite_are_named(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    tensors["tall"][299, 4] = torch.nan
    tensors["flat"][3] = -torch.inf
    with pytest.raises(NonFiniteError, match=r"^NaN or infinite weights in .*; --allow-nonfinite"):
        copied(tmp_path, tensors)
    assert set(copied(tmp_path, tensors, allows_nonfinite=True)) == {"tall", "flat"}


def test_of_many_only_some_are_named(tmp_path: Path) -> None:
    many = {f"t{i}": torch.tensor([torch.nan]) for i in range(8)}
    with pytest.raises(NonFiniteError, match=r"t0, t1, t2, t3, t4 and 3 more;"):
        copied(tmp_path, many)


@pytest.mark.parametrize("workers", [1, 4])
def test_the_first_error_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: dict[str, Tensor], workers: int
) -> None:
    monkeypatch.setattr(copying, "PIECE_BYTES", 1)
    source, num_calls = OneFile(tmp_path / "file.safetensors", tensors), 0

    def write(name: str, start: int, rows: Tensor) -> None:
        nonlocal num_calls
        num_calls += 1
        raise ValueError("no space left")

    with pytest.raises(ValueError, match="no space left"):
        copy(source, write, workers=workers, title="")
    assert num_calls < sum(len(tensor) for tensor in tensors.values())
