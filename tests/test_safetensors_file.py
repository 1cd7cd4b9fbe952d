"""Where tensors lie in a safetensors file: as its own library sees it, or an error."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints_conversion.safetensors_file import DTYPES, lay_out, read_places
from checkpoints_conversion.source import File, Info

TENSORS = {
    name.lower(): torch.arange(5.0 * (3 + i)).view(3 + i, 5).to(dtype)
    for i, (name, dtype) in enumerate(DTYPES.items())
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def header_of(file: Path) -> tuple[dict, bytes]:
    """The header, and all that comes after it."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def rewrite(file: Path, header: dict | list | str, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def refusal(file: Path) -> str:
    with pytest.raises(ValueError, match=r"\A\S") as raised:
        read_places(file)
    assert str(raised.value).startswith(f"{file}: ")
    return str(raised.value)


def test_places_are_where_the_library_wrote(file: Path) -> None:
    places, content = read_places(file), file.read_bytes()
    assert places.keys() == TENSORS.keys()
    for name, place in places.items():
        assert place.info == Info(tuple(TENSORS[name].shape), TENSORS[name].dtype)
        found = content[place.offset : place.offset + place.info.num_bytes]
        assert found == raw(TENSORS[name]), name
    offsets = [place.offset for place in places.values()]
    assert offsets == sorted(offsets)


def test_the_library_reads_what_is_laid_out(tmp_path: Path) -> None:
    path = tmp_path / "new.safetensors"
    infos = {name: Info(tuple(t.shape), t.dtype) for name, t in TENSORS.items()}
    header, places, num_bytes = lay_out(infos)
    assert len(header) % 8 == 0
    new = File(path, num_bytes)
    new.write(0, header)
    for name in reversed(TENSORS):
        new.write(places[name].offset, TENSORS[name])
    new.close()
    assert path.stat().st_size == num_bytes
    assert read_places(path) == places
    loaded = load_file(path)
    assert all(raw(loaded[name]) == raw(tensor) for name, tensor in TENSORS.items())
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_number_of_no_dimension_is_a_row(file: Path) -> None:
    save_file({"scale": torch.tensor(2.0)}, file)
    assert read_places(file)["scale"].info == Info((1,), torch.float32)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "model.safetensors").endswith(": missing; download it again")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot be read: Too many levels of symbolic links" in refusal(tmp_path / "loop")


@pytest.mark.parametrize("keep", [0, 4, 8, 9, 200, -100, -1])
def test_a_truncated_file(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    assert "damaged or truncated" in refusal(file)
    assert "download it again" in refusal(file)


def test_bytes_after_the_last_tensor(file: Path) -> None:
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + b"\0")
    assert f"damaged or truncated ({size + 1} bytes where its header makes it {size})" in refusal(
        file
    )


@pytest.mark.parametrize("header", ["{", "", "[]", "null", '{"a": 1}', '{"a": {}}', "\udcff"])
def test_a_broken_header(file: Path, header: str) -> None:
    text = header.encode(errors="surrogateescape")
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    assert "damaged or truncated (no header)" in refusal(file)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("data_offsets", [4, 64]),  # shorter than its shape
        ("data_offsets", [60, 0]),
        ("data_offsets", [0]),
        ("data_offsets", None),
        ("shape", [3, 6]),
        ("shape", None),
        ("shape", ["3", "5"]),
        ("dtype", None),
    ],
)
def test_a_header_that_contradicts_itself(file: Path, entry: str, value: object) -> None:
    header, data = header_of(file)
    first = min((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    header[first][entry] = value
    rewrite(file, header, data)
    assert refusal(file)


def test_tensors_that_overlap_or_leave_a_hole(file: Path) -> None:
    """The library refuses such a file, too: nothing in it can be trusted."""
    save_file({name: torch.ones(4) for name in "abc"}, file)
    header, data = header_of(file)
    first, second, _ = sorted(header, key=lambda name: header[name]["data_offsets"])
    header[second]["data_offsets"] = header[first]["data_offsets"]
    rewrite(file, header, data)
    assert "damaged (tensors overlap or leave holes)" in refusal(file)
    with pytest.raises(Exception, match=r"(?i)offset|header"):
        load_file(file)


def test_numbers_of_a_type_that_no_weight_has(file: Path) -> None:
    save_file({"count": torch.ones(3, dtype=torch.int64)}, file)
    assert "holds I64 numbers; it may be F64, F32, F16, BF16, F8_E4M3" in refusal(file)


def test_no_damage_to_a_header_is_more_than_a_refusal(file: Path) -> None:
    """A changed byte gives an error, or a header as good as any (another name)."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    num_refused = 0
    for position in range(8 + length):
        damaged = bytearray(content)
        damaged[position] ^= 1
        file.write_bytes(damaged)
        try:
            places = read_places(file)
        except ValueError:
            num_refused += 1
        else:
            ends = [place.offset + place.info.num_bytes for place in places.values()]
            assert max(ends) == len(content)
    assert length / 2 < num_refused < length  # the others are letters of names
