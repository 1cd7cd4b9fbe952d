"""vLLM engines inside the training processes, one per group of `rollout.tensor` ranks.

The engine joins the process group that exists already (vLLM's external launcher), and takes new
weights in place from an iterator of whole tensors under their Hugging Face names.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from megatron_nft.config import RolloutConfig
from megatron_nft.policy import host
from megatron_nft.rollout.engine import Answers, Digests, Sampling, seed_of
from megatron_nft.rollout.groups import Problem, Response
from megatron_nft.rollout.receiver import RECEIVER


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
            worker_extension_cls=RECEIVER,
            seed=seed,
        )
        self._stop_ids = _stop_ids(self._llm, tokenizer)
        self.num_engines = dist.get_world_size() // rollout.tensor
        self.number = dist.get_rank() // rollout.tensor
        self.version = -1

    def generate(
        self, problems: Sequence[Problem], expected: Sequence[float], sampling: Sampling
    ) -> Answers:
        """Answers to this engine's share of the problems.

        The ranks of one engine all get its answers.
        """
        mine = _share(expected, self.number, self.num_engines)
        prompts = [{"prompt_token_ids": problems[i].prompt_tokens.tolist()} for i in mine]
        params = [self._params(sampling, i, len(problems[i].prompt_tokens)) for i in mine]
        with host.suspended():
            outputs = self._llm.generate(prompts, params, use_tqdm=False) if prompts else []
        answers = [
            (i, tuple(self._response(c, p.seed) for c in output.outputs))
            for i, p, output in zip(mine, params, outputs, strict=True)
        ]
        return sorted(answers, key=lambda answer: answer[0])

    def load_weights(
        self, weights: Iterable[tuple[str, Tensor]], version: int
    ) -> dict[str, Digests]:
        """Take new weights in place and forget every cached prefix; consumes the iterator."""
        with host.suspended():
            digests = self._llm.collective_rpc("receive", kwargs={"weights": weights})[0]
            self._llm.reset_prefix_cache()
        self.version = version
        return {f"engine {self.number}": digests}

    def probe(self, texts: Sequence[np.ndarray]) -> dict[str, list[np.ndarray]]:
        """See Engine; every rank of an engine asks it."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=1.0)
        prompts = [{"prompt_token_ids": text.tolist()} for text in texts]
        with host.suspended():
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
        found = [
            np.array(
                [p[t].logprob for p, t in zip(o.prompt_logprobs[1:], text[1:], strict=True)],
                np.float32,
            )
            for o, text in zip(outputs, texts, strict=True)
        ]
        return {f"engine {self.number}": found}

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
            seed=seed_of(sampling.seed, number),
            stop_token_ids=self._stop_ids,
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
        )

    def _response(self, completion: Any, seed: int) -> Response:
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
            seed=seed + completion.index,
            version=self.version,
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


def _share(expected: Sequence[float], number: int, num_engines: int) -> list[int]:
    """The problems of one of the engines, longest first: each goes to whom has the least so far."""
    loads, share = [0.0] * num_engines, []
    for i in sorted(range(len(expected)), key=lambda i: -expected[i]):
        least = loads.index(min(loads))
        loads[least] += expected[i]
        if least == number:
            share.append(i)
    return share
