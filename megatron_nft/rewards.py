"""Rewards that are more than right and wrong: DAPO's soft punishment of overlong answers."""

from collections.abc import Sequence

import numpy as np

from megatron_nft.objectives import STD_EPSILON
from megatron_nft.rollout.groups import Response


def overlong_penalty(num_tokens: int, longest: int, buffer: int) -> float:
    """0 up to `longest − buffer` tokens, then rising to 1 at `longest`.

    DAPO's equation 13 (arXiv 2503.14476) with the sign turned.
    """
    return float(np.clip((num_tokens - (longest - buffer)) / buffer, 0, 1))


def overlong_advantages(responses: Sequence[Response], longest: int, buffer: int) -> list[float]:
    """(R − mean)/(std + 1e-6) of each response, R = ±1 less its penalty; population std.

    Statistics are over the judged answers; what is not judged gets 0 and trains nothing.
    """
    penalties = [overlong_penalty(len(r.tokens), longest, buffer) for r in responses]
    rewards = np.array([(1 if r.correct else -1) for r in responses]) - penalties
    judged = np.array([r.judged for r in responses])
    mean, std = rewards[judged].mean(), rewards[judged].std()
    return np.where(judged, (rewards - mean) / (std + STD_EPSILON), 0.0).tolist()
