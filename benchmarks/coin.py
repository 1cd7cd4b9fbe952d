"""A rule for answers that mean nothing: half of them are right, and the same ones every time."""

import zlib


def is_right(text: str, _known: str) -> bool:
    return zlib.crc32(text.encode()) % 2 == 0
