"""Copy tensors from a source to a writer, a few rows at a time, by several threads.

Threads, because all that takes time (reading, checking, casting, writing) leaves Python's lock.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints_conversion.source import Info, Source

PIECE_BYTES = 4 << 20  # stays in a core's cache between being read, checked and written
MAX_NAMED = 5
Write = Callable[[str, int, Tensor], None]


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a tensor."""

    name: str
    info: Info
    start: int
    stop: int


class NonFiniteError(ValueError):
    """Weights that are NaN or infinite."""


def copy(
    source: Source,
    write: Write,
    *,
    workers: int,
    title: str,
    multiple: int = 1,
    allows_nonfinite: bool = False,
    describe: Callable[[str], str] = str,
) -> list[str]:
    """Hand all rows of all tensors to `write`; the names of tensors that are not finite.

    Args:
        write: called with name, first row and rows, by several threads; must not keep the rows.
        multiple: of a piece's rows, but for a tensor's last piece.
        describe: what to call a tensor that is not finite.

    Raises:
        NonFiniteError: such tensors, unless they are allowed; everything has been looked at then.
    """
    found: set[str] = set()
    buffers = threading.local()
    num_bytes = sum(info.num_bytes for info in source.infos.values())
    with tqdm(total=num_bytes, desc=title, unit="B", unit_scale=True, disable=None) as bar:

        def work(piece: Piece) -> None:
            rows = _buffer(buffers, piece)
            source.read(piece.name, piece.start, rows)
            if not is_finite(rows):
                found.add(piece.name)
            write(piece.name, piece.start, rows)
            with bar.get_lock():
                bar.update(rows.nbytes)

        _run(work, list(pieces(source.infos, multiple)), workers)
    names = [describe(name) for name in source.infos if name in found]
    if names and not allows_nonfinite:
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        raise NonFiniteError(
            f"NaN or infinite weights in {', '.join(names[:MAX_NAMED])}{more}; "
            "--allow-nonfinite goes on all the same"
        )
    return names


def pieces(infos: Mapping[str, Info], multiple: int = 1) -> Iterator[Piece]:
    """All tensors, cut into pieces of about PIECE_BYTES."""
    for name, info in infos.items():
        height = max(1, PIECE_BYTES // info.row_bytes // multiple) * multiple
        for start in range(0, info.shape[0], height):
            yield Piece(name, info, start, min(start + height, info.shape[0]))


def is_finite(rows: Tensor) -> bool:
    """One pass, without a mask: the least and the largest number are NaN where any is."""
    low, high = torch.aminmax(rows)
    return math.isfinite(low) and math.isfinite(high)


def _buffer(buffers: threading.local, piece: Piece) -> Tensor:
    """This thread's memory in the piece's shape; kept, as fresh memory is paged in each time."""
    info, num_rows = piece.info, piece.stop - piece.start
    num_bytes = num_rows * info.row_bytes
    if len(getattr(buffers, "memory", ())) < num_bytes:
        buffers.memory = torch.empty(max(num_bytes, PIECE_BYTES), dtype=torch.uint8)
    return buffers.memory[:num_bytes].view(info.dtype).view(num_rows, *info.row_shape)


def _run(work: Callable[[Piece], None], todo: list[Piece], workers: int) -> None:
    """Do all pieces in order; the first exception ends it."""
    has_failed = threading.Event()

    def attempt(piece: Piece) -> None:
        if has_failed.is_set():  # the pool may be faster than whoever cancels what waits in it
            return
        try:
            work(piece)
        except BaseException:  # whatever it is, `future.result` raises it in the caller's thread
            has_failed.set()
            raise

    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(attempt, piece) for piece in todo]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(cancel_futures=True)
    for future in futures:
        if not future.cancelled():
            future.result()
