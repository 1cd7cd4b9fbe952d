"""vLLM engines inside the training processes, one per group of `rollout.tensor` ranks.

The engine joins the process group that exists already (vLLM's external launcher), and takes new
weights in place from an iterator of whole tensors under their Hugging Face names.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_nft.config import RolloutConfig
from megatron_nft.policy import host
from megatron_nft.rollout.engine import (
    Answers,
    Digests,
    Hear,
    Sampling,
    ignore,
    sampling_params,
    stop_ids,
)
from megatron_nft.rollout.groups import Problem, Response
from megatron_nft.rollout.receiver import RECEIVER, precision


class ColocatedEngine:
    """This rank's engine; its ranks and those of other engines call every method together.

    Args:
        path: the Hugging Face directory that the first weights and the architecture come from.
        max_tokens: prompt and response together.
        on_progress: called after every step of the engine.
    """

    is_collective = True

    def __init__(
        self,
        path: Path,
        tokenizer: Any,
        rollout: RolloutConfig,
        dtype: str,
        max_tokens: int,
        seed: int,
        on_progress: Callable[[], object] = lambda: None,
    ) -> None:
        self._on_progress = on_progress
        os.environ |= host.vllm_environment(rollout.cpu_kv_cache_gib)
        self._tokenizer = tokenizer
        self._llm = _start(
            model=str(path),
            **precision(rollout.quantization, dtype),
            distributed_executor_backend="external_launcher",
            tensor_parallel_size=rollout.tensor,
            max_model_len=max_tokens,
            max_num_seqs=rollout.max_sequences,
            gpu_memory_utilization=rollout.memory_fraction,
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled from
            skip_tokenizer_init=True,
            enforce_eager=not host.has_cuda(),
            **host.vllm_options(max_tokens),
            **host.sleep_options(),
            enable_prefix_caching=True,
            disable_log_stats=True,
            worker_extension_cls=RECEIVER,
            seed=seed,
        )
        self._stop_ids = stop_ids(path, tokenizer)
        self.num_engines = dist.get_world_size() // rollout.tensor
        self.number = dist.get_rank() // rollout.tensor
        self.version = -1
        self.counts = Counter[str]()  # it ends with the process

    def generate(
        self,
        problems: Sequence[Problem],
        expected: Sequence[float],
        sampling: Sampling,
        hear: Hear = ignore,
    ) -> Answers:
        """Answers to this engine's share of the problems.

        The ranks of one engine all get its answers.
        """
        mine = _share(expected, self.number, self.num_engines)
        params = {i: self._params(sampling, i, len(problems[i].prompt_tokens)) for i in mine}
        enough = ceil(sampling.finish_fraction * len(mine))
        answers: Answers = []
        with host.suspended():
            prompts = {i: problems[i].prompt_tokens for i in mine}
            for i, output in self._sample(prompts, params, enough):
                responses = tuple(self._response(c, params[i].seed) for c in output.outputs)
                answers.append((i, responses))
                hear(i, responses)
        return sorted(answers, key=lambda answer: answer[0])

    def load_weights(
        self, weights: Iterable[tuple[str, Tensor]], version: int
    ) -> dict[str, Digests]:
        """Take new weights in place and forget every cached prefix; consumes the iterator.

        An engine that sleeps wakes for them; the cache's memory comes back once they are in, and
        with it vLLM's scheduler goes on.
        """
        torch.cuda.empty_cache()  # what torch keeps for itself, vLLM cannot wake in
        with host.suspended():
            self._wake("weights")
            received = self._llm.collective_rpc("receive", kwargs={"weights": weights})[0]
            if received["failure"]:
                raise RuntimeError(f"the engine did not take the weights: {received['failure']}")
            self._wake("kv_cache")
            is_forgotten = self._llm.reset_prefix_cache()
        assert is_forgotten, "cached prefixes are in use"
        assert not self._is_asleep
        self.version = version
        return {f"engine {self.number}": received["digests"]}

    def held(self, shapes: Mapping[str, tuple[int, ...]]) -> Digests:
        """Digests of what the engine keeps of tensors of these names and shapes; see Receiver."""
        return self._llm.collective_rpc("held", kwargs={"shapes": shapes})[0]

    def sleep(self) -> dict[str, float]:
        """Give up weights and cache until load_weights; what that gave back of the device, in GiB.

        On a CPU host the engine sleeps as well, and keeps its memory.
        """
        before = host.memory_in_use()
        with host.suspended():
            self._llm.sleep(level=2)  # discards weights too: new ones come before it is asked again
        after = host.memory_in_use()
        self.version = -1
        return {
            "engine_gib_given_back": (before - after) / 2**30,
            "device_gib_while_asleep": after / 2**30,
        }

    def probe(self, texts: Sequence[np.ndarray]) -> dict[str, list[np.ndarray]]:
        """See Engine; every rank of an engine asks it."""
        from vllm import SamplingParams

        assert not self._is_asleep
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

    @property
    def _is_asleep(self) -> bool:
        return self._llm.llm_engine.is_sleeping()

    def _wake(self, what: str) -> None:
        if self._is_asleep:
            self._llm.wake_up(tags=[what])

    def _sample(
        self, prompts: dict[int, np.ndarray], params: dict[int, Any], enough: int
    ) -> Iterator[tuple[int, Any]]:
        """vLLM's outputs and their prompts' numbers, as they end; after `enough` the rest is cut.

        LLM.generate does the same, but waits for all.
        """
        from vllm.inputs.engine import tokens_input

        assert not self._is_asleep, "its weights are gone: load_weights comes first"
        engine, unfinished = self._llm.llm_engine, set(prompts)
        for number, tokens in prompts.items():
            engine.add_request(str(number), tokens_input(tokens.tolist()), params[number])
        with _progress(len(prompts)) as bar:
            try:
                while len(prompts) - len(unfinished) < enough:
                    finished = {int(o.request_id): o for o in engine.step() if o.finished}
                    unfinished -= finished.keys()
                    bar.update(len(finished))
                    self._on_progress()
                    yield from finished.items()
            finally:  # on_progress may abandon them all
                engine.abort_request([str(number) for number in unfinished])
                # vLLM keeps those of questions cut off
                engine.output_processor.parent_requests.clear()

    def _params(self, sampling: Sampling, number: int, num_prompt_tokens: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        room = self._llm.llm_engine.model_config.max_model_len - num_prompt_tokens
        params = sampling_params(sampling, number, room, self._stop_ids)
        return SamplingParams(**params, output_kind=RequestOutputKind.FINAL_ONLY)

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


def _progress(num_questions: int) -> tqdm:
    """A bar on the terminal, where sampling takes long enough for one."""
    return tqdm(
        total=num_questions,
        desc="sampling",
        unit="question",
        delay=10,
        leave=False,
        disable=dist.get_rank() != 0,
        dynamic_ncols=True,
    )


def _share(expected: Sequence[float], number: int, num_engines: int) -> list[int]:
    """The problems of one of the engines, longest first: each goes to whom has the least so far."""
    loads, share = [0.0] * num_engines, []
    for i in sorted(range(len(expected)), key=lambda i: -expected[i]):
        least = loads.index(min(loads))
        loads[least] += expected[i]
        if least == number:
            share.append(i)
    return share
