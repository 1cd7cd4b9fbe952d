"""What vLLM's workers take weights with: an extension of theirs, in this process or a server's.

vLLM mixes the class into its worker (`worker_extension_cls`) and calls its methods by name
(`collective_rpc`).
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from checkpoints_conversion.digest import digest
from checkpoints_conversion.hf_files import HFWeights, read_hf_config
from megatron_nft.policy import host
from megatron_nft.rollout.transfer import let_go, received

logger = logging.getLogger("megatron_nft")

RECEIVER = "megatron_nft.rollout.receiver.Receiver"


class Received(TypedDict):
    """What one worker says of weights that were to be taken."""

    digests: dict[str, str]  # of each tensor as it arrived
    failure: str  # why they were not all taken; empty: they were


def precision(quantization: str, dtype: str) -> dict[str, str]:
    """vLLM's `dtype` and `quantization`; it has kernels for FP8 beside bfloat16, not float32.

    Each output channel and each token has a scale of its own, whatever the shapes and the ranks.
    """
    if quantization == "fp8":
        return {"dtype": "bfloat16", "quantization": "fp8_per_channel"}
    return {"dtype": dtype}


class Receiver:
    """Methods that a vLLM worker gets.

    What goes wrong with weights is told, not raised: where a server has several workers, vLLM
    hears the first one's error alone, and takes those of the others for answers to later calls.
    """

    def sees(self, directory: str) -> bool:
        """Whether weights that are written there can be received."""
        return Path(directory).is_dir()

    def receive(
        self, weights: Iterable[tuple[str, Tensor]] | None = None, path: str = ""
    ) -> Received:
        """Take whole tensors under their Hugging Face names in place, or those of a directory."""
        return self._receive(_of_directory(Path(path)) if weights is None else weights)

    def receive_sent(self, host: str, port: int, backend: str, within_s: float) -> Received:
        """The same, of what a transfer.Sender there sends."""
        return self._receive(self._sent(host, port, backend, within_s))

    def try_to_receive(self, host: str, port: int, backend: str, within_s: float) -> Received:
        """See what is sent, which is not taken as weights."""
        digests: dict[str, str] = {}
        arriving = digested(self._sent(host, port, backend, within_s), digests)
        return Received(digests=digests, failure=_trouble_of(partial(deque, arriving, maxlen=0)))

    def _receive(self, weights: Iterable[tuple[str, Tensor]]) -> Received:
        digests: dict[str, str] = {}
        model = self.model_runner.get_model()
        host.pack_experts_anew(model)
        failure = self._reload(digested(weights, digests))
        del weights  # whoever sends them waits until they are gone
        if failure:
            # vLLM keeps what came of a layer until the rest comes, and would go on from there at
            # the next reload, with that one's tensors in the places of others: let it finish.
            failure = "; ".join(filter(None, [failure, self._reload(iter(()))]))
        host.repack_tied_head(model)
        return Received(digests=digests, failure=failure)

    def _reload(self, weights: Iterator[tuple[str, Tensor]]) -> str:
        return _trouble_of(partial(self.reload_weights, weights_iterator=weights))

    def _sent(self, *sender: Any) -> Iterator[tuple[str, Tensor]]:
        return received(*sender, rank=self.rank + 1, num_workers=self.parallel_config.world_size)

    def held(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Digests of those of the named tensors that the model keeps whole, as rows of a parameter.

        Others are split over ranks, quantized or packed for a kernel.
        """
        model, found = self.model_runner.get_model(), {}
        fused = getattr(model, "packed_modules_mapping", {})
        for name, parameter in model.named_parameters():
            path, _, kind = name.rpartition(".")
            prefix, dot, module = path.rpartition(".")
            names = [f"{prefix}{dot}{part}.{kind}" for part in fused.get(module, [module])]
            rows = _rows([shapes.get(n) for n in names], tuple(parameter.shape))
            pieces = parameter[: sum(rows)].split(rows) if rows else ()
            found |= {n: digest(piece) for n, piece in zip(names, pieces, strict=False)}
        return found


def digested(
    weights: Iterable[tuple[str, Tensor]], digests: dict[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """The same tensors; the digest of each is in `digests` once it has come."""
    for name, tensor in weights:
        digests[name] = digest(tensor)
        yield name, tensor


def _trouble_of(work: Callable[[], object]) -> str:
    """What goes wrong while it is done; empty: nothing. Why it is not raised, see Receiver."""
    try:
        work()
    except Exception as error:
        logger.error("weights were not taken", exc_info=error)
        let_go(error)
        return f"{type(error).__name__}: {error}"
    return ""


def _rows(shapes: list[tuple[int, ...] | None], whole: tuple[int, ...]) -> list[int]:
    """How many rows of a parameter each tensor has; none where they do not make it up.

    A vocabulary has more rows than its model.
    """
    if None in shapes or any(shape[1:] != whole[1:] for shape in shapes):
        return []
    rows = [shape[0] for shape in shapes]
    is_whole = sum(rows) == whole[0] or (len(rows) == 1 and rows[0] < whole[0])
    return rows if is_whole else []


def _of_directory(path: Path) -> Iterator[tuple[str, Tensor]]:
    source = HFWeights(path, read_hf_config(path))
    for name in source.infos:
        yield name, source[name]
