"""What vLLM's workers take weights with: an extension of theirs, in this process or a server's.

vLLM mixes the class into its worker (`worker_extension_cls`) and calls its methods by name
(`collective_rpc`).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from checkpoints_conversion.digest import digest
from checkpoints_conversion.hf_files import HFWeights, read_hf_config
from megatron_nft.policy import host

RECEIVER = "megatron_nft.rollout.receiver.Receiver"


class Receiver:
    """Methods that a vLLM worker gets."""

    def receive(
        self, weights: Iterable[tuple[str, Tensor]] | None = None, path: str = ""
    ) -> dict[str, str]:
        """Take whole tensors under their Hugging Face names in place, or those of a directory.

        Returns the digest of each as it arrived.
        """
        digests: dict[str, str] = {}
        model = self.model_runner.get_model()
        host.pack_experts_anew(model)
        weights = _of_directory(Path(path)) if weights is None else weights
        self.reload_weights(weights_iterator=_digested(weights, digests))
        host.repack_tied_head(model)
        return digests


def _digested(
    weights: Iterable[tuple[str, Tensor]], digests: dict[str, str]
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        digests[name] = digest(tensor)
        yield name, tensor


def _of_directory(path: Path) -> Iterator[tuple[str, Tensor]]:
    source = HFWeights(path, read_hf_config(path))
    for name in source.infos:
        yield name, source[name]
