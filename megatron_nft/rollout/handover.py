"""The policy's weights to the engine, which then proves that it holds them.

Two proofs after every update. The digests of what each engine took must be those of what process 0
streamed: data-parallel replicas that have drifted apart fail here as well as a lost tensor. And the
log-probabilities that engine and policy give to fixed texts must be alike, which fails where an
engine took every tensor and put one in a wrong place or form. Whoever sees a difference, all
processes raise it.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq

import numpy as np
import torch.distributed as dist
from torch import Tensor

from checkpoints_conversion.hf_files import some
from checkpoints_conversion.stream import stream
from megatron_nft.config import Config
from megatron_nft.policy.packing import Sequence
from megatron_nft.policy.step import Policy
from megatron_nft.rollout.engine import SHOWN, Digests, Engine, differences, probe_limit
from megatron_nft.rollout.receiver import digested

NUM_TEXTS, TEXT_TOKENS = 4, 32


def hand_over(
    policy: Policy,
    engine: Engine,
    version: int,
    texts: Seq[np.ndarray] | None = None,
    tolerance: float | None = None,
) -> dict[str, float]:
    """Stream the policy's weights into the engine and have it prove that it holds them.

    Collective. Texts (int32 [T], T > 1) and tolerance (mean |Δlogp|) are the recipe's unless given.

    Returns:
        weights_version, weights_gib (of whole tensors), probe_delta_mean and probe_delta_max.

    Raises:
        RuntimeError: on all processes; which engine does not hold which tensor, or how far its
            log-probabilities are from the policy's.
    """
    sent = Sent()
    weights = sent.noted(stream(policy.chunks, policy.hf_config))
    received = engine.load_weights(weights, version)
    sent.digests = _of_first(sent.digests)
    raise_together(
        [
            f"weights version {version}: {name} does not hold what was sent: {trouble}"
            for name, digests in received.items()
            if (trouble := differences(sent.digests, digests))
        ]
    )
    texts = probe_texts(policy.config, policy.hf_config.vocab_size) if texts is None else texts
    tolerance = allowed(policy.config) if tolerance is None else tolerance
    deltas = _deltas(policy, engine, texts)
    raise_together(
        [
            f"weights version {version}: {_too_far(name, d, tolerance)}. {_suspects(engine, sent)}"
            for name, d in deltas.items()
            if not d.mean() <= tolerance  # a NaN is within no tolerance
        ]
    )
    whole = np.concatenate([d for theirs in on_all(list(deltas.values())) for d in theirs])
    return {
        "weights_version": version,
        "weights_gib": sent.num_bytes / 2**30,
        "probe_delta_mean": float(whole.mean()),
        "probe_delta_max": float(whole.max()),
    }


class Sent:
    """What process 0 sends, as it goes by; the others see names, shapes and bytes."""

    def __init__(self) -> None:
        self.digests: Digests = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.num_bytes = 0

    def noted(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same tensors."""
        for name, tensor in digested(weights, self.digests) if dist.get_rank() == 0 else weights:
            self.shapes[name] = tuple(tensor.shape)
            self.num_bytes += tensor.nbytes
            yield name, tensor


def raise_together(complaints: Seq[str]) -> None:
    """Raise what any process complains about, on all; collective.

    Raises:
        RuntimeError: with every complaint once, in the order of the processes.
    """
    if found := dict.fromkeys(c for theirs in on_all(complaints) for c in theirs):
        raise RuntimeError("\n".join(found))


def on_all[T](value: T) -> list[T]:
    """Every process's value, on all; collective."""
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def probe_texts(config: Config, vocab_size: int) -> list[np.ndarray]:
    """Random tokens, always the same: int32 [T]. The engine has room for one token after them."""
    room = config.data.max_prompt_tokens + config.rollout.max_response_tokens - 1
    rng = np.random.default_rng(0)
    shape = (NUM_TEXTS, min(TEXT_TOKENS, room))
    return list(rng.integers(0, vocab_size, shape).astype(np.int32))


def allowed(config: Config) -> float:
    """The recipe's tolerance, or that of the coarsest numbers that either side computes with."""
    return probe_limit(config.rollout, config.model.dtype, is_fp8=config.fp8.format != "off")


def _deltas(policy: Policy, engine: Engine, texts: Seq[np.ndarray]) -> dict[str, np.ndarray]:
    """|Δlogp| of all texts' tokens by the engines of this process, float32 [N]; collective."""
    ours = np.concatenate(policy.logp([_sequence(text) for text in texts], temperature=1.0))
    probed = engine.probe(texts)
    return {name: np.abs(np.concatenate(theirs) - ours) for name, theirs in probed.items()}


def _too_far(name: str, deltas: np.ndarray, tolerance: float) -> str:
    return (
        f"log-probabilities of the probe by {name} differ from the policy's by {deltas.mean():.2e} "
        f"in the mean and {deltas.max():.2e} at most; {tolerance:.0e} is allowed in the mean "
        "(rollout.probe_tolerance)"
    )


def _sequence(text: np.ndarray) -> Sequence:
    """All tokens but the first, as if they answered it."""
    blank = np.zeros(len(text) - 1, np.float32)
    return Sequence(text[:1], text[1:], blank, blank, correct=True, group_accuracy=0.5)


def _suspects(engine: Engine, sent: Sent) -> str:
    """Which tensors the engine holds otherwise than they came, as far as that can be looked up."""
    held = engine.held(sent.shapes)
    same_form = {n: d for n, d in held.items() if _form(d) == _form(sent.digests[n])}
    wrong = [name for name, digest in same_form.items() if digest != sent.digests[name]]
    arrived = "Every tensor arrived as it was sent, so the engine misplaced or misread some"
    if wrong:
        return f"{arrived}: {some(wrong, SHOWN)}"
    return (
        f"{arrived}. Which, cannot be said: {len(same_form)} of {len(sent.digests)} tensors could "
        "be looked up in it and are right, and it keeps the others in other forms"
    )


def _form(digest: str) -> str:
    """Shape and dtype."""
    return digest.partition("-")[2]


def _of_first(value: Digests) -> Digests:
    """Process 0's value, on all."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
