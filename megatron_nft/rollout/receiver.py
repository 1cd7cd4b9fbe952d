"""What vLLM's workers take weights with: an extension of theirs, in this process or a server's.

vLLM mixes the class into its worker (`worker_extension_cls`) and calls its methods by name
(`collective_rpc`).
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoints_conversion.digest import digest
from checkpoints_conversion.hf_files import HFWeights, read_hf_config
from megatron_nft.policy import host
from megatron_nft.rollout.transfer import received

RECEIVER = "megatron_nft.rollout.receiver.Receiver"


def precision(quantization: str, dtype: str) -> dict[str, str]:
    """vLLM's `dtype` and `quantization`; it has kernels for FP8 beside bfloat16, not float32.

    Each output channel and each token has a scale of its own, whatever the shapes and the ranks.
    """
    if quantization == "fp8":
        return {"dtype": "bfloat16", "quantization": "fp8_per_channel"}
    return {"dtype": dtype}


class Receiver:
    """Methods that a vLLM worker gets."""

    def sees(self, directory: str) -> bool:
        """Whether weights that are written there can be received."""
        return Path(directory).is_dir()

    def receive(
        self, weights: Iterable[tuple[str, Tensor]] | None = None, path: str = ""
    ) -> dict[str, str]:
        """Take whole tensors under their Hugging Face names in place, or those of a directory.

        Returns the digest of each as it arrived.
        """
        digests: dict[str, str] = {}
        failures: list[Exception] = []
        model = self.model_runner.get_model()
        host.pack_experts_anew(model)
        weights = _of_directory(Path(path)) if weights is None else weights
        weights = _until_failure(digested(weights, digests), failures)
        self.reload_weights(weights_iterator=weights)
        host.repack_tied_head(model)
        if failures:
            raise failures[0]
        return digests

    def receive_sent(self, host: str, port: int, backend: str, within_s: float) -> dict[str, str]:
        """The same, of what a transfer.Sender there sends."""
        return self.receive(self._sent(host, port, backend, within_s))

    def try_to_receive(self, host: str, port: int, backend: str, within_s: float) -> dict[str, str]:
        """Digests of what is sent, which is not taken as weights."""
        return {name: digest(t) for name, t in self._sent(host, port, backend, within_s)}

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


def _until_failure(
    weights: Iterable[tuple[str, Tensor]], failures: list[Exception]
) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, and where they break off, an end: vLLM has to finish what it began.

    It keeps what came of a layer until the rest comes, and would go on from there at the next
    reload, with that one's tensors in the places of others.
    """
    try:
        yield from weights
    except (RuntimeError, ValueError, OSError) as error:
        failures.append(error)


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
