"""Many tensors travel as a few large pieces."""

from collections.abc import Sequence

BUCKET_BYTES = 256 << 20


def buckets(sizes: Sequence[int], limit: int) -> list[slice]:
    """Consecutive items, as many as fit into `limit` together; a larger one is alone."""
    starts, filled = [0], 0
    for i, size in enumerate(sizes):
        if filled and filled + size > limit:
            starts.append(i)
            filled = 0
        filled += size
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(sizes)], strict=True)]
