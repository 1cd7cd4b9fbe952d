"""The safetensors format: where a file's tensors lie (https://github.com/huggingface/safetensors).

Eight bytes give the length of a JSON header, which gives each tensor's dtype, shape and place in
the bytes after it. The library's own functions read whole tensors, or write whole files from
memory; a conversion that streams rows needs the places.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from checkpoints_conversion.source import Info

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8  # of the header's length, as the library writes it
MAX_HEADER_BYTES = 100_000_000  # the library's own limit


@dataclass(frozen=True)
class Place:
    """A tensor in a file."""

    info: Info
    offset: int  # of its first byte


def read_places(file: Path) -> dict[str, Place]:
    """Where every tensor of a file lies, in the file's order.

    Raises:
        ValueError: the file is missing, damaged or truncated, or it holds another type.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length <= MAX_HEADER_BYTES else None
        num_bytes = file.stat().st_size
        assert isinstance(header, dict)
        header.pop("__metadata__", None)
        places = {name: _place(entry, 8 + length) for name, entry in header.items()}
        end = max((p.offset + p.info.num_bytes for p in places.values()), default=8 + length)
    except FileNotFoundError as error:
        raise ValueError(f"{file}: missing; download it again") from error
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    except _UnsupportedError as error:
        raise ValueError(f"{file}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"{file}: damaged or truncated (no header); download it again") from error
    if num_bytes != end:
        raise ValueError(
            f"{file}: damaged or truncated ({num_bytes} bytes where its header makes it {end}); "
            "download it again"
        )
    places = dict(sorted(places.items(), key=lambda item: item[1].offset))
    ends = accumulate((place.info.num_bytes for place in places.values()), initial=8 + length)
    if any(place.offset != end for place, end in zip(places.values(), ends, strict=False)):
        raise ValueError(f"{file}: damaged (tensors overlap or leave holes); download it again")
    return places


class _UnsupportedError(Exception):
    """A tensor of a dtype that no weight of ours has."""


def _place(entry: dict, base: int) -> Place:
    if entry["dtype"] not in DTYPES:
        raise _UnsupportedError(f"holds {entry['dtype']} numbers; it may be {', '.join(DTYPES)}")
    info = Info(tuple(entry["shape"]) or (1,), DTYPES[entry["dtype"]])
    start, stop = entry["data_offsets"]
    if stop - start != info.num_bytes:
        raise ValueError("a tensor whose bytes are not its shape's")
    return Place(info, base + start)


def lay_out(infos: Mapping[str, Info]) -> tuple[bytes, dict[str, Place], int]:
    """A new file's header, the tensors' places behind it, and the whole file's size."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, info in infos.items():
        header[name] = {
            "dtype": NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.num_bytes],
        }
        offset += info.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    base = 8 + len(text)
    places = {
        name: Place(info, base + header[name]["data_offsets"][0]) for name, info in infos.items()
    }
    return len(text).to_bytes(8, "little") + text, places, base + offset
