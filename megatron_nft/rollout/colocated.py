"""vLLM engines inside the training processes, one per group of `rollout.tensor` ranks.

The engine joins the process group that exists already (vLLM's external launcher), and takes new
weights in place from an iterator of whole tensors under their Hugging Face names.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from megatron_nft.config import RolloutConfig
from megatron_nft.policy import host
from megatron_nft.rollout.groups import Problem, Response


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; `seed` and a problem's number decide every one of them."""

    answers: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int


class ColocatedEngine:
    """This rank's engine.

    Args:
        path: the Hugging Face directory that the first weights and the architecture come from.
        max_tokens: prompt and response together.
    """

    def __init__(
        self,
        path: Path,
        tokenizer: Any,
        rollout: RolloutConfig,
        dtype: str,
        max_tokens: int,
        seed: int,
    ) -> None:
        os.environ |= host.vllm_environment(rollout.cpu_kv_cache_gib)
        self._tokenizer = tokenizer
        self._llm = _start(
            model=str(path),
            dtype=dtype,
            distributed_executor_backend="external_launcher",
            tensor_parallel_size=rollout.tensor,
            max_model_len=max_tokens,
            max_num_seqs=rollout.max_sequences,
            gpu_memory_utilization=rollout.memory_fraction,
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled from
            skip_tokenizer_init=True,
            enforce_eager=not host.has_cuda(),
            **host.vllm_options(max_tokens),
            enable_prefix_caching=True,
            disable_log_stats=True,
            seed=seed,
        )
        self._stop_ids = _stop_ids(self._llm, tokenizer)
        self.num_engines = dist.get_world_size() // rollout.tensor
        self.number = dist.get_rank() // rollout.tensor
        self.weights_version = -1

    def generate(
        self, problems: Sequence[Problem], sampling: Sampling
    ) -> list[tuple[int, tuple[Response, ...]]]:
        """Answers to this engine's share of the problems: (index into `problems`, K responses).

        The share is every num_engines-th problem. The ranks of one engine all get its answers.
        """
        mine = range(self.number, len(problems), self.num_engines)
        prompts = [{"prompt_token_ids": problems[i].prompt_tokens.tolist()} for i in mine]
        params = [self._params(sampling, i, len(problems[i].prompt_tokens)) for i in mine]
        with host.suspended():
            outputs = self._llm.generate(prompts, params, use_tqdm=False) if prompts else []
        return [
            (i, tuple(self._response(completion) for completion in output.outputs))
            for i, output in zip(mine, outputs, strict=True)
        ]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take new weights in place and forget every cached prefix; consumes the iterator."""
        with host.suspended():
            self._llm.apply_model(host.pack_experts_anew)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self._llm.apply_model(host.repack_tied_head)
            self._llm.reset_prefix_cache()
        self.weights_version = version

    def close(self) -> None:
        """End the engine while the process groups that it made still exist."""
        self._llm.llm_engine.engine_core.shutdown()

    def _params(self, sampling: Sampling, number: int, num_prompt_tokens: int) -> Any:
        from vllm import SamplingParams

        room = self._llm.llm_engine.model_config.max_model_len - num_prompt_tokens
        return SamplingParams(
            n=sampling.answers,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=min(sampling.max_tokens, room),
            seed=_seed(sampling.seed, number),
            stop_token_ids=self._stop_ids,
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
        )

    def _response(self, completion: Any) -> Response:
        tokens = np.array(completion.token_ids, np.int32)
        logp = np.array(completion.logprobs.logprobs, np.float32)
        assert len(tokens) == len(logp), "vLLM returned another number of log-probabilities"
        if completion.finish_reason not in ("stop", "length"):  # would pass for a wrong answer
            raise RuntimeError(f"vLLM ended an answer with {completion.finish_reason!r}")
        return Response(
            tokens=tokens,
            logp=logp,
            finish=completion.finish_reason,
            text=self._tokenizer.decode(tokens, skip_special_tokens=True),
        )


def _start(**options: Any) -> Any:
    with host.suspended():
        from vllm import LLM  # after its environment is set

        return LLM(**options)


def _stop_ids(llm: Any, tokenizer: Any) -> list[int]:
    """The tokenizer's end of text and whatever the model's generation config adds to it."""
    configured = llm.llm_engine.model_config.try_get_generation_config().get("eos_token_id") or []
    configured = [configured] if isinstance(configured, int) else configured
    return sorted({tokenizer.eos_token_id, *configured} - {None})


def _seed(seed: int, number: int) -> int:
    """A seed for one question that neither engines nor their number have a say in."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint32)[0])
