"""A digest of a tensor, by which what was sent and what arrived are compared.

It is computed where the tensor lies, in integers, so that it is the same there as anywhere, and
nothing but two numbers per half MiB leaves a GPU. Of 64-bit words w at places i of a block, with
odd multipliers m that differ in their last 17 bits, it takes

    Σ w·m   and   Σ (w >> 32)·m   modulo 2⁶⁴

The first changes with any one bit, because m is odd. When two words change places, it changes by
(w − w')·(m' − m): a multiple of 2⁶⁴ only where the words' lower halves are equal, and then the
second sum changes. The blocks' sums are then scrambled, and added up. It guards against accidents,
not against attacks.
"""

from functools import cache

import torch
from torch import Tensor

BLOCK = 1 << 16  # words
GPU_BLOCKS = 64  # at once: two temporary copies of 32 MiB
MASK = (1 << 64) - 1


def digest(tensor: Tensor) -> str:
    """Of the bytes, the shape and the dtype."""
    value = 0
    for block, sums in enumerate(_sums(_words(tensor))):
        for k, number in enumerate(sums):
            value += _scrambled(number + (2 * block + k) * 0x9E3779B97F4A7C15)
    return f"{value & MASK:016x}-{tuple(tensor.shape)}-{tensor.dtype}"


def _words(tensor: Tensor) -> list[Tensor]:
    """The bytes as int64: blocks [n, BLOCK], and the rest [1, m], if any, filled up by zeros."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    num_words, num_left = divmod(len(raw), 8)
    whole = raw[: 8 * num_words]
    if whole.storage_offset() % 8:
        whole = whole.clone()
    words = whole.view(torch.int64)
    num_in_blocks = num_words // BLOCK * BLOCK
    rest = words[num_in_blocks:]
    if num_left:
        last = raw.new_zeros(8)
        last[:num_left] = raw[-num_left:]
        rest = torch.cat((rest, last.view(torch.int64)))
    parts = (words[:num_in_blocks].view(-1, BLOCK), rest.view(1, -1))
    return [part for part in parts if part.numel()]


def _sums(parts: list[Tensor]) -> list[list[int]]:
    """The two sums of every block."""
    found = []
    for part in parts:
        multipliers = _multipliers(part.device)[: part.shape[1]]
        for piece in part.split(1 if part.is_cpu else GPU_BLOCKS):  # a core's cache holds one
            product = piece * multipliers
            lower = product.sum(1)
            upper = torch.bitwise_right_shift(piece, 32, out=product).mul_(multipliers).sum(1)
            found.append(torch.stack((lower, upper), 1))
    return torch.cat(found).tolist() if found else []


@cache
def _multipliers(device: torch.device) -> Tensor:
    """Odd, random in the upper bits, and each another in the lower 17: int64 [BLOCK]."""
    places = torch.arange(BLOCK, dtype=torch.int64)
    upper = [_scrambled(i) >> 17 << 17 for i in range(BLOCK)]
    numbers = torch.tensor([n - (n >> 63 << 64) for n in upper], dtype=torch.int64)
    return (numbers + 2 * places + 1).to(device)


def _scrambled(number: int) -> int:
    """A one-to-one map of 64-bit numbers whose every bit depends on all (splitmix64's)."""
    number &= MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & MASK
    return number ^ (number >> 31)
