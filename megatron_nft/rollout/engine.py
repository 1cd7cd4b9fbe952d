"""What an engine is: it takes weights, shows that it holds them, and answers questions."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from checkpoints_conversion.hf_files import read_json, some
from megatron_nft.config import RolloutConfig
from megatron_nft.rollout.groups import Problem, Response

# Mean |Δlogp| that rounding explains. Two correct programs differ by the order of additions, which
# grows from layer to layer: 1e-6 to 3e-5 in float32 (benchmarks/rollout.py, random models of up to
# ten layers). In bfloat16 (8 bits) a logit of 20 is itself rounded by up to 0.06, and random text
# has such logits. FP8 rounds weights and activations to 4 bits, by 3 % on average. A tensor in a
# wrong place shows as more. One that was left as it was before a small update does not, until the
# updates have added up: that is for the digests to see.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.15, "fp8": 0.5}

SHOWN = 3  # tensors in a message

Answers = list[tuple[int, tuple[Response, ...]]]  # index of a problem, its K responses
Digests = dict[str, str]  # by the tensors' Hugging Face names
Hear = Callable[[int, tuple[Response, ...]], None]  # told a problem's answers once they are there


def ignore(_number: int, _responses: tuple[Response, ...]) -> None:
    """A Hear that can wait."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; `seed` and a problem's number decide every one of them.

    `finish_fraction`: once so many of the questions are answered, the rest is cut off. `numbers`:
    of each problem where they are not 0, 1, …: of several sets each has its own.
    """

    answers: int | tuple[int, ...]  # to every problem, or to each
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    finish_fraction: float = 1.0
    numbers: tuple[int, ...] = ()

    def seed_for(self, number: int) -> int:
        """Of a problem's answers, by the problem's place."""
        return seed_of(self.seed, self.numbers[number] if self.numbers else number)

    def answers_to(self, number: int) -> int:
        """A problem, by its place."""
        return self.answers if isinstance(self.answers, int) else self.answers[number]


class Engine(Protocol):
    """One or more vLLM engines."""

    version: int  # of the weights that they hold; −1 before any came
    is_collective: bool  # every process samples its share; else only rank 0 calls generate
    counts: Counter[str]  # of what went wrong and was made good, since the start

    def generate(
        self,
        problems: Sequence[Problem],
        expected: Sequence[float],
        sampling: Sampling,
        hear: Hear = ignore,
    ) -> Answers:
        """Answers to the problems that this process is to ask, in the problems' order.

        `expected` is how many tokens each one's answers are likely to have: the longest are asked
        first. Problems that were cut off are not among the answers. `hear` gets each problem's
        answers while others are being sampled, in any order and maybe in another thread.
        """

    def load_weights(
        self, weights: Iterable[tuple[str, Tensor]], version: int
    ) -> dict[str, Digests]:
        """Take whole tensors in place; what each engine of this process received, by its name.

        Collective: every process consumes its iterator to the end.
        """

    def probe(self, texts: Sequence[np.ndarray]) -> dict[str, list[np.ndarray]]:
        """Log-probabilities (temperature 1) that each engine of this process gives to texts.

        Of every token (int32 [T]) but the first: float32 [T − 1].
        """

    def held(self, shapes: Mapping[str, tuple[int, ...]]) -> Digests:
        """Digests of those of the named tensors that can be looked up in this process's engine."""

    def sleep(self) -> dict[str, float]:
        """Give memory back while nothing is sampled, where the engine shares a device; metrics.

        Where it gave up its weights, `version` is −1 then, and load_weights wakes it.
        """

    def close(self) -> None:
        """End what was started."""


def sampling_params(
    sampling: Sampling, number: int, room: int, stop_ids: Sequence[int]
) -> dict[str, Any]:
    """vLLM's SamplingParams for a problem, by its place, with room for so many tokens.

    Engines of all kinds sample by these, so that they sample the same.
    """
    return {
        "n": sampling.answers_to(number),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": min(sampling.max_tokens, room),
        "seed": sampling.seed_for(number),
        "stop_token_ids": list(stop_ids),
        "logprobs": 0,  # of the sampled token alone
        "flat_logprobs": True,
        "detokenize": False,
    }


def stop_ids(path: Path, tokenizer: Any) -> list[int]:
    """The tokenizer's end of text and whatever the model's generation config adds to it."""
    file = path / "generation_config.json"
    configured = (read_json(file) if file.exists() else {}).get("eos_token_id") or []
    configured = [configured] if isinstance(configured, int) else configured
    return sorted({tokenizer.eos_token_id, *configured} - {None})


def probe_limit(rollout: RolloutConfig, dtype: str, *, is_fp8: bool = False) -> float:
    """Of the probe: the recipe's, or that of the coarsest numbers that are computed with.

    Args:
        dtype: of the weights.
        is_fp8: the policy computes in it.
    """
    kind = "fp8" if is_fp8 or rollout.quantization == "fp8" else dtype
    return rollout.probe_tolerance or TOLERANCES[kind]


def differences(expected: Digests, found: Digests) -> str:
    """The first tensors that are other ones, lacking or too many, and how many; empty for none."""
    wrong = [
        f"{name} ({expected[name]} was sent, {digest} arrived)"
        for name, digest in found.items()
        if expected.get(name, digest) != digest
    ]
    kinds = {
        "other values": wrong,
        "missing": [name for name in expected if name not in found],
        "never sent": [name for name in found if name not in expected],
    }
    return "; ".join(f"{what}: {some(names, SHOWN)}" for what, names in kinds.items() if names)


def seed_of(seed: int, number: int) -> int:
    """A seed for one question that neither engines nor their number have a say in.

    vLLM gives a question's k-th answer this seed plus k.
    """
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint32)[0])
