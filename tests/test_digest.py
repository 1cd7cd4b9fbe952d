"""A digest changes with whatever may happen to a tensor on its way."""

import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoints_conversion import digest as module
from checkpoints_conversion.digest import BLOCK, digest

MASK = (1 << 64) - 1
SHAPES = [(), (1,), (7,), (3, 5), (67, 32), (BLOCK + 3, 5)]


def _random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _by_formula(tensor: Tensor) -> int:
    """The sums of the module's docstring in Python's integers and numpy's wrapping ones."""
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    words = np.frombuffer(raw + bytes(-len(raw) % 8), np.int64)
    multipliers = module._multipliers(torch.device("cpu")).numpy()
    value, number = 0, 0
    for start in range(0, len(words), BLOCK):
        block = words[start : start + BLOCK]
        for part in (block, block >> 32):
            total = int((part * multipliers[: len(part)]).sum())
            value += module._scrambled(total + number * 0x9E3779B97F4A7C15)
            number += 1
    return value & MASK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = _random(shape, dtype)
    assert digest(tensor) == f"{_by_formula(tensor):016x}-{shape}-{dtype}"


@pytest.mark.parametrize("num_blocks", [1, 2, 64])
def test_blocks_at_once_do_not_matter(monkeypatch: pytest.MonkeyPatch, num_blocks: int) -> None:
    """A GPU takes many at once, a CPU one."""
    tensor = _random((5 * BLOCK + 3,), torch.bfloat16)
    expected = digest(tensor)
    split = Tensor.split
    monkeypatch.setattr(Tensor, "split", lambda part, _: split(part, num_blocks))
    assert digest(tensor) == expected


@pytest.mark.parametrize("where", [0, 1, 3, 1000, 8 * BLOCK - 1, 8 * BLOCK, 8 * BLOCK + 998])
def test_any_flipped_bit_shows(where: int) -> None:
    tensor = _random((2 * BLOCK + 250,))  # with a rest of half a word
    raw, before = tensor.view(torch.uint8), digest(tensor)
    seen = {before}
    for bit in range(8):
        raw[where] ^= 1 << bit
        seen.add(digest(tensor))
        raw[where] ^= 1 << bit
    assert len(seen) == 9
    assert digest(tensor) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distance", [1, 2, 4, 64, 2 * BLOCK, 4 * BLOCK])
def test_numbers_that_change_places_show(dtype: torch.dtype, distance: int) -> None:
    """Also such as differ in the sign alone, whose difference is 2⁶³ or a multiple of it."""
    for first, second in ((1.0, -1.0), (0.0, -0.0), (1.0, 1.0078125)):
        tensor = torch.ones(6 * BLOCK, dtype=dtype)
        other = tensor.clone()
        tensor[5], tensor[5 + distance] = first, second
        other[5], other[5 + distance] = second, first
        assert digest(tensor) != digest(other)


def test_rows_that_change_places_show() -> None:
    tensor = _random((300, 1000))
    other = tensor[[1, 0, *range(2, 300)]]
    assert digest(tensor) != digest(other)
    assert digest(tensor) != digest(tensor.flip(0))


def test_shape_and_dtype_count() -> None:
    zeros = [
        torch.zeros(6),
        torch.zeros(2, 3),
        torch.zeros(3, 2),
        torch.zeros(12, dtype=torch.bfloat16),
        torch.zeros(6, dtype=torch.int32),
        torch.zeros(0),
        torch.zeros(0, 3),
    ]
    assert len({digest(tensor) for tensor in zeros}) == len(zeros)


def test_only_the_numbers_count_not_how_they_lie() -> None:
    tensor = _random((40, 30), torch.bfloat16)
    flat = torch.cat((torch.zeros(3, dtype=torch.bfloat16), tensor.view(-1)))
    for other in (tensor.T.contiguous().T, flat[3:].view(40, 30), tensor.clone()):
        assert digest(other) == digest(tensor)
    assert digest(torch.nn.Parameter(tensor)) == digest(tensor)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gpu_gives_the_same(shape: tuple[int, ...]) -> None:
    tensor = _random(shape)
    assert digest(tensor.cuda()) == digest(tensor)
