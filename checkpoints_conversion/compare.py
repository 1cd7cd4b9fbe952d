"""Are two checkpoints the same model? Settings, names, shapes, dtypes, bits, and what differs."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from checkpoints_conversion.checkpoint import Checkpoint
from checkpoints_conversion.copying import copy
from checkpoints_conversion.hf_files import some
from checkpoints_conversion.settings import differing
from checkpoints_conversion.source import Info, Source
from checkpoints_conversion.views import only


@dataclass
class Difference:
    """How two tensors of one name and shape differ."""

    num_numbers: int = 0  # that are not bitwise equal, or of different value where dtypes differ
    largest: float = 0.0  # |a − b|; infinite where one alone is NaN
    index: tuple[int, ...] = ()  # of the largest
    values: tuple[float, float] = (0.0, 0.0)  # there


@dataclass
class Comparison:
    """What was found; `a` and `b` are the tensors of the two."""

    a: dict[str, Info]
    b: dict[str, Info]
    settings: list[str]  # in which the configurations differ
    differences: dict[str, Difference] = field(default_factory=dict)

    @property
    def common(self) -> list[str]:
        """Names in both, of one shape."""
        return [name for name, info in self.a.items() if name in self.b and self._same(name, info)]

    @property
    def is_equal(self) -> bool:
        """Bitwise, in every respect."""
        return self.a == self.b and not self.settings and not self.differences

    def lines(self) -> Iterator[str]:
        """The result in words, worst first."""
        if self.settings:
            yield f"configurations: {'; '.join(self.settings)}"
        for title, mine, others in (("only in A", self.a, self.b), ("only in B", self.b, self.a)):
            if alone := [name for name in mine if name not in others]:
                yield f"{title}: {some(alone)}"
        for name in self.a:
            if name in self.b and not self._same(name, self.a[name]):
                yield f"shape of {name}: {self.a[name].shape} in A, {self.b[name].shape} in B"
        if dtypes := {(str(self.a[n].dtype), str(self.b[n].dtype)) for n in self.common}:
            for ours, theirs in sorted(dtypes):
                if ours != theirs:
                    yield f"dtype: {ours} in A, {theirs} in B"
        yield from self._differences()

    def _differences(self) -> Iterator[str]:
        common, found = self.common, self.differences
        yield f"{len(common) - len(found)} of {len(common)} common tensors are equal"
        for name, d in sorted(found.items(), key=lambda item: -item[1].largest)[:10]:
            yield (
                f"{name}: {d.num_numbers} numbers differ, most by {d.largest:.3g} at "
                f"{list(d.index)} ({d.values[0]:.6g} in A, {d.values[1]:.6g} in B)"
            )
        if len(found) > 10:
            yield f"and {len(found) - 10} more tensors differ, each by less"

    def _same(self, name: str, info: Info) -> bool:
        return self.b[name].shape == info.shape


def compare(a: Checkpoint, b: Checkpoint, workers: int = 2) -> Comparison:
    """Compare two checkpoints tensor by tensor, under their Hugging Face names.

    Memory is bounded by a few pieces of a tensor.
    """
    different = differing(a.hf_config, b.hf_config)
    result = Comparison(dict(a.tensors.infos), dict(b.tensors.infos), different)
    lock = threading.Lock()

    def look(name: str, start: int, rows: Tensor) -> None:
        if found := _difference(rows, _rows_of(b.tensors, name, start, len(rows)), start):
            with lock:
                known = result.differences.setdefault(name, Difference())
                result.differences[name] = _worse(known, found)

    names = result.common
    copy(only(a.tensors, names), look, workers=workers, title="comparing", allows_nonfinite=True)
    return result


def _rows_of(source: Source, name: str, start: int, num_rows: int) -> Tensor:
    info = source.infos[name]
    rows = torch.empty(num_rows, *info.row_shape, dtype=info.dtype)
    source.read(name, start, rows)
    return rows


def _difference(a: Tensor, b: Tensor, start: int) -> Difference | None:
    """Between some rows, the first of which is the tensor's `start`-th; None where equal."""
    if a.dtype == b.dtype:
        is_equal = a.view(-1).view(torch.uint8).equal(b.view(-1).view(torch.uint8))
        if is_equal:
            return None
    exact = torch.promote_types(a.dtype, b.dtype)
    differs = (a.to(exact) != b.to(exact)) & ~(a.isnan() & b.isnan())
    if not differs.any():  # in sign of zero or kind of NaN at most
        return None if a.dtype != b.dtype else Difference(1, 0.0, (start,), (0.0, 0.0))
    distance = (a.double() - b.double()).abs().nan_to_num(nan=inf, posinf=inf)
    distance = distance.where(differs, -1.0)
    place = torch.unravel_index(distance.argmax(), distance.shape)
    index = tuple(int(i) for i in place)
    return Difference(
        int(differs.sum()),
        float(distance[place]),
        (index[0] + start, *index[1:]),
        (float(a[place]), float(b[place])),
    )


def _worse(a: Difference, b: Difference) -> Difference:
    worst = b if b.largest > a.largest or not a.num_numbers else a
    return Difference(a.num_numbers + b.num_numbers, worst.largest, worst.index, worst.values)
