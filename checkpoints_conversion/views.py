"""One side's files under the other side's names: rows of the one are runs of rows of the other."""

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Mapping as ReadOnly

from torch import Tensor
from transformers import PretrainedConfig

from checkpoints_conversion.families import mappings_for, sizes_of
from checkpoints_conversion.mapping import Run, tops
from checkpoints_conversion.source import Info, Source

# a run of rows: where it begins in the view's tensor, whose rows they are, where they begin there
Piece = tuple[int, str, int, int]


class View:
    """A `Source` whose tensors are made of another's rows."""

    def __init__(
        self, source: Source, infos: ReadOnly[str, Info], pieces: ReadOnly[str, list[Piece]]
    ) -> None:
        self.infos = dict(sorted(infos.items(), key=lambda item: _place(item[0])))
        self._source, self._pieces = source, pieces

    def sources(self, name: str) -> str:
        """The names of the tensors that this one is made of."""
        return " or ".join(dict.fromkeys(piece[1] for piece in self._pieces[name]))

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out` with the tensor's rows from `start` on."""
        pieces, stop = self._pieces[name], start + len(out)
        first = bisect_right(pieces, start, key=lambda piece: piece[0]) - 1
        for top, source_name, source_top, num_rows in pieces[first:]:
            if top >= stop:
                break
            begin, end = max(start, top), min(stop, top + num_rows)
            rows = out[begin - start : end - start]
            self._source.read(source_name, source_top + begin - top, rows)


def only(source: Source, names: Iterable[str]) -> View:
    """The source with these tensors alone."""
    infos = {name: source.infos[name] for name in names}
    pieces = {name: [(0, name, 0, info.shape[0])] for name, info in infos.items()}
    return View(source, infos, pieces)


def as_megatron(hf: Source, hf_config: PretrainedConfig) -> View:
    """A Hugging Face directory's tensors as Megatron's parameters."""
    sizes, infos, pieces = sizes_of(hf_config), {}, {}
    for mapping in mappings_for(hf_config):
        runs, shape = mapping.runs(sizes), mapping.megatron_shape(sizes)
        for name, hf_names in mapping.names(sizes):
            dtypes = {hf.infos[hf_name].dtype for hf_name in hf_names}
            if len(dtypes) > 1:
                raise ValueError(f"{', '.join(hf_names)} have different dtypes: one parameter")
            infos[name] = Info(shape, dtypes.pop())
            pieces[name] = [
                (top, hf_names[run.source], run.start, run.stop - run.start)
                for top, run in zip(tops(runs), runs, strict=True)
            ]
    return View(hf, infos, pieces)


def as_hf(megatron: Source, hf_config: PretrainedConfig) -> View:
    """A Megatron checkpoint's parameters as Hugging Face tensors, in the table's order by layer."""
    sizes, infos, pieces = sizes_of(hf_config), {}, {}
    for mapping in mappings_for(hf_config):
        by_source = _inverted(mapping.runs(sizes))
        shapes = mapping.hf_shapes(sizes)
        for name, hf_names in mapping.names(sizes):
            for source, hf_name in enumerate(hf_names):
                infos[hf_name] = Info(shapes[source], megatron.infos[name].dtype)
                pieces[hf_name] = [
                    (run.start, name, top, run.stop - run.start) for top, run in by_source[source]
                ]
    return View(megatron, infos, pieces)


def _inverted(runs: list[Run]) -> dict[int, list[tuple[int, Run]]]:
    """Each HF tensor's runs in its own order, with their places in the Megatron parameter."""
    found = defaultdict(list)
    for top, run in zip(tops(runs), runs, strict=True):
        found[run.source].append((top, run))
    return {source: sorted(places, key=lambda p: p[1].start) for source, places in found.items()}


def _place(name: str) -> tuple[int, int]:
    """Embedding, layers one by one, the rest: the order in which checkpoints have them."""
    if layer := re.search(r"\.layers\.(\d+)\.", name):
        return 1, int(layer[1])
    return (0 if "embed" in name else 2), 0
