"""Seconds until answers are sampled, by going through it as an engine would.

A decoding step reads the weights once, and the keys and values of all that is in flight; its few
rows cost operations only where they are many. Engines take answers as places become free, and the
last ones end with hardly anything in flight: that tail is in it.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

import numpy as np

from checkpoints_conversion.families import sizes_of
from megatron_nft.config import Config
from megatron_nft.plan import cards
from megatron_nft.plan.cards import Card
from megatron_nft.plan.memory import cached_tokens, layer_parameters
from megatron_nft.plan.shape import bytes_of, rate
from megatron_nft.plan.workload import Workload
from megatron_nft.policy.flops import matmul_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Decoder:
    """One engine's step, over its `rollout.tensor` GPUs."""

    def __init__(self, hf_config: PretrainedConfig, config: Config, card: Card) -> None:
        self.sizes, self.card, self.tensor = sizes_of(hf_config), card, config.rollout.tensor
        sizes, whole = self.sizes, bytes_of(config)
        is_fp8 = config.rollout.quantization == "fp8"
        self.rate = max(card.fp8.values()) if is_fp8 else rate(config, card)
        self.bandwidth = cards.DECODING * card.bandwidth * self.tensor
        self.num_seen = matmul_parameters(hf_config)
        self.head_bytes = whole * sizes.hidden * sizes.vocab
        self.bytes_each = 1 if is_fp8 else whole
        one_expert = 3 * sizes.hidden * sizes.ffn if sizes.num_experts else 0
        self.experts = sizes.num_layers * sizes.num_experts * one_expert
        self.others = sizes.num_layers * layer_parameters(hf_config) - self.experts
        self.chosen = hf_config.num_experts_per_tok / sizes.num_experts if sizes.num_experts else 0
        self.cache_bytes = whole * 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim
        self.hidden_bytes = whole * sizes.hidden

    def seconds(self, num_active: float, num_cached: float) -> float:
        """Of a step that gives so many answers a token, with keys and values of so many tokens."""
        read = self.weight_bytes(num_active) / self.bandwidth
        computed = 2 * self.num_seen * num_active / (self.rate * self.tensor)
        cached = self.cache_bytes * num_cached / self.bandwidth
        scheduled = cards.STEP_S + cards.SEQUENCE_S * num_active
        return max(read, computed) + cached + self._all_reduces(num_active) + scheduled

    def weight_bytes(self, num_active: float) -> float:
        """Read over all the engine's GPUs; of a mixture the experts that any of them chooses."""
        touched = self.experts * (1 - (1 - self.chosen) ** num_active)
        return self.bytes_each * (self.others + touched) + self.head_bytes

    def _all_reduces(self, num_active: float) -> float:
        if self.tensor == 1:
            return 0.0
        sent = 2 * (self.tensor - 1) / self.tensor * self.hidden_bytes * num_active
        each = cards.ALL_REDUCE_S + sent / self.card.nvlink
        return 2 * self.sizes.num_layers * each


def num_engines(config: Config, num_gpus: int) -> int:
    """Of which each has its share of the questions."""
    if config.rollout.engine == "remote":
        return len(config.rollout.servers) or config.rollout.num_servers
    return max(1, num_gpus // config.rollout.tensor)


def rollout_seconds(
    hf_config: PretrainedConfig, config: Config, card: Card, num_gpus: int, workload: Workload
) -> float:
    """Of one rollout, asked as often as it needs; 0 where nothing is asked."""
    asked, answers = workload.num_asked, workload.num_answers
    if not asked:
        return 0.0
    fraction = workload.finish_fraction
    args = hf_config, config, card, num_gpus, workload
    return workload.num_asks * sampling_seconds(*args, asked, answers, fraction)


def sampling_seconds(
    hf_config: PretrainedConfig,
    config: Config,
    card: Card,
    num_gpus: int,
    workload: Workload,
    num_questions: float,
    num_answers: float,
    finish_fraction: float = 1.0,
) -> float:
    """Until that fraction of the answers to so many questions is there, prompts included.

    Args:
        num_answers: to a question, on the average.
    """
    num_groups = math.ceil(num_questions / num_engines(config, num_gpus))
    decoder = Decoder(hf_config, config, card)
    remaining = workload.lengths(math.ceil(num_groups * num_answers))
    np.random.default_rng(0).shuffle(remaining)
    room = cached_tokens(hf_config, config, card) / workload.sequence_tokens
    places = int(max(1, min(config.rollout.max_sequences, room)))
    prompts = 2 * decoder.num_seen * num_groups * workload.prompt_tokens
    filled = prompts / (decoder.rate * decoder.tensor)  # a group's answers share their prompt
    num_wanted = math.ceil(finish_fraction * len(remaining))
    prompt = workload.prompt_tokens
    return filled + _decoded(decoder, remaining.tolist(), places, prompt, num_wanted)


def _decoded(
    decoder: Decoder, lengths: list[float], places: int, prompt: float, num_wanted: int
) -> float:
    """Seconds until so many of them have ended, a segment between two ends of answers at a time."""
    seconds = now = cached = 0.0
    active: list[tuple[float, float]] = []  # (steps at its end, its length)
    waiting = lengths[::-1]
    for _ in range(num_wanted):
        while waiting and len(active) < places:
            length = waiting.pop()
            heapq.heappush(active, (now + length, length))
            cached += prompt
        end, length = heapq.heappop(active)
        steps, num_active = end - now, len(active) + 1
        seconds += steps * decoder.seconds(num_active, cached + num_active * steps / 2)
        cached += num_active * steps - length - prompt
        now = end
    return seconds
