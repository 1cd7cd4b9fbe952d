"""A digest of a tensor, by which what was sent and what arrived are compared."""

import zlib

import torch
from torch import Tensor


def digest(tensor: Tensor) -> str:
    """Of the bytes, the shape and the dtype."""
    raw = tensor.detach().contiguous().cpu().view(torch.uint8).numpy()
    return f"{zlib.crc32(raw):08x}-{tuple(tensor.shape)}-{tensor.dtype}"
