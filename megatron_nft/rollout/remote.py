"""vLLM servers, of this run or of others: asked over HTTP by one process.

Process 0 talks to the servers, from a thread with an event loop of its own, so that a batch can
be sampled while the policy trains. Weights are written once, as a Hugging Face directory that
every server reads; or kept once, in host memory, and sent to every server.
"""

import asyncio
import concurrent.futures
import shlex
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import ExitStack
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from checkpoints_conversion import megatron_to_hf
from checkpoints_conversion.hf_files import read_hf_config
from megatron_nft.config import RolloutConfig
from megatron_nft.policy import host
from megatron_nft.rollout import servers
from megatron_nft.rollout.asking import Asking, Question, number_of
from megatron_nft.rollout.client import Answer, Client
from megatron_nft.rollout.engine import (
    Answers,
    Digests,
    Hear,
    Sampling,
    ignore,
    probe_limit,
    sampling_params,
    stop_ids,
)
from megatron_nft.rollout.fleet import ANSWER_WITHIN_S, Fleet, Member, Weights
from megatron_nft.rollout.groups import Problem, Response
from megatron_nft.rollout.receiver import digested
from megatron_nft.rollout.servers import ServerProcess
from megatron_nft.rollout.transfer import Cargo

TRIAL_TIMEOUT_S = 30.0
KEPT_VERSIONS = 2  # directories of weights: a server may be reading the one before


class RemoteEngine:
    """The servers of `rollout.servers`, or `rollout.num_servers` started here, as one engine.

    Args:
        path: the Hugging Face directory that the first weights and the architecture come from.
        max_tokens: prompt and response together.
        run_dir: weights that go by files are in its `engine/weights`, the logs of servers that are
            started here in its `logs`.
        on_progress: called, in another thread, whenever a server is seen to have made tokens.

    Raises:
        ValueError: too few GPUs for the servers, or a server given by address does not fit.
        RuntimeError: a server did not start; the end of its log is in the message.
    """

    is_collective = False

    def __init__(
        self,
        path: Path,
        tokenizer: Any,
        rollout: RolloutConfig,
        dtype: str,
        max_tokens: int,
        seed: int,
        run_dir: Path,
        on_progress: Callable[[], object] = lambda: None,
    ) -> None:
        self.version = -1
        self.counts = Counter(engine_restarts=0, questions_asked_again=0)
        self._path, self._tokenizer, self._rollout = path, tokenizer, rollout
        self._dtype, self._max_tokens, self._seed = dtype, max_tokens, seed
        self._run_dir, self._on_progress = run_dir.resolve(), on_progress
        self._device = host.device()  # of this thread; that of the servers' has another
        self._stop_ids = stop_ids(path, tokenizer)
        self._processes: list[ServerProcess] = []
        self._fleet: Fleet | None = None
        self._thread: threading.Thread | None = None
        self._closing, self._is_closed = threading.Lock(), False
        self._abandoned = threading.Event()
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="servers", daemon=True)
        self._thread.start()
        with ExitStack() as on_failure:
            on_failure.callback(self.close)
            self._call(self._start())
            on_failure.pop_all()

    def generate(
        self,
        problems: Sequence[Problem],
        expected: Sequence[float],
        sampling: Sampling,
        hear: Hear = ignore,
    ) -> Answers:
        """See Engine; of process 0 alone, in any thread.

        Raises:
            Interrupted: see abandon.
            RuntimeError: every server is lost and none comes back, one refuses a question, or a
                question is lost again and again.
        """
        order = sorted(range(len(problems)), key=lambda i: -expected[i])
        questions = {i: self._question(problems[i], sampling, i) for i in order}
        enough = ceil(sampling.finish_fraction * len(problems))
        # Twice what a server samples at once: a question's answers end at different times, and
        # the next one's begin in their places.
        num_at_once = 2 * self._rollout.max_sequences
        responses: dict[int, tuple[Response, ...]] = {}

        def tell(number: int, answers: list[Answer]) -> None:
            seed = questions[number].params["seed"]
            responses[number] = tuple(self._response(a, seed) for a in answers)
            hear(number, responses[number])

        asking = Asking(
            self._fleet, questions, enough, num_at_once, self.counts, tell, self._abandoned
        )
        return [(i, responses[i]) for i in sorted(self._call(asking.run()))]

    def abandon(self) -> None:
        """Ask nothing more: generate raises Interrupted, in whatever thread it is waited for."""
        self._abandoned.set()

    def listen(self) -> None:
        """Ask again, after `abandon`, once nothing waits for answers any more."""
        self._abandoned.clear()

    def load_weights(
        self, weights: Iterable[tuple[str, Tensor]], version: int
    ) -> dict[str, Digests]:
        """See Engine. With `rollout.in_flight_updates` a batch may be under way.

        Raises:
            RuntimeError: every server is lost and none comes back.
        """
        self.version = version
        if self._fleet is None:
            for _ in weights:
                pass
            return {}
        num_running = sum(m.num_questions for m in self._fleet.members)
        assert self._rollout.in_flight_updates or not num_running, "weights while sampling"
        if self._sends:
            return self._call(self._fleet.hand_over(self._keep(weights, version)))
        received = self._call(self._fleet.hand_over(self._write(weights, version)))
        self._remove_old_weights()
        return received

    def probe(self, texts: Sequence[np.ndarray]) -> dict[str, list[np.ndarray]]:
        """See Engine: of every server that lives."""
        return self._call(self._fleet.probe(texts)) if self._fleet else {}

    def held(self, shapes: Mapping[str, tuple[int, ...]]) -> Digests:
        """See Engine: nothing can be looked up from here."""
        return {}

    def sleep(self) -> dict[str, float]:
        """See Engine: the servers have devices of their own."""
        return {}

    def close(self) -> None:
        """End the servers that were started here; a batch under way ends in a RuntimeError."""
        if self._thread is None:
            return
        with self._closing:
            self._is_closed = True
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._thread = None
        servers.end(self._processes)
        shutil.rmtree(self._weights_directory, ignore_errors=True)

    # servers

    async def _start(self) -> None:
        if self._rollout.servers:
            members = [
                Member(f"server {i}", Client(url)) for i, url in enumerate(self._rollout.servers)
            ]
        else:
            gpus = servers.shares_of_gpus(self._rollout, torch.cuda.device_count())
            members = [self._member(i, share) for i, share in enumerate(gpus)]
        limit = probe_limit(self._rollout, self._dtype)
        first = Weights(self._path)
        self._fleet = Fleet(members, first, self._rollout, limit, self.counts, self._on_progress)
        if self._rollout.servers:
            if not self._sends:
                self._weights_directory.mkdir(parents=True, exist_ok=True)
            await asyncio.gather(*map(self._check, members))
        await self._fleet.start()

    def _member(self, number: int, gpus: Sequence[str]) -> Member:
        log = self._run_dir / "logs" / f"engine_{number}.log"
        # in turns, the trainers rest while servers sample
        num_trainers = host.num_local_processes() if self._rollout.max_steps_off_policy else 0
        shares = self._rollout.num_servers, num_trainers
        process = ServerProcess(log, servers.environment(self._rollout, gpus, *shares))
        self._processes.append(process)
        client = Client(socket=process.socket)
        where = ("--uds", process.socket)
        return Member(f"server {number}", client, process, lambda path: self._command(path, *where))

    def _command(self, path: Path, *where: object) -> list[str]:
        return servers.command(
            path, self._rollout, self._dtype, self._max_tokens, self._seed, *where
        )

    async def _check(self, member: Member) -> None:
        """Raise ValueError where a server given by address is not what the run needs."""
        try:
            await member.until_ready(self._rollout.start_timeout_s)
            trouble = await self._trouble(member.client)
        except RuntimeError as error:
            trouble = f"does not do what a run needs: {error}"
        if trouble:
            raise ValueError(
                f"rollout.servers: {member.client.url} {trouble}; start it on the network of the "
                "job alone (it asks nobody who they are) by\nVLLM_SERVER_DEV_MODE=1 "
                + shlex.join(self._command(self._path, "--host", "HOST", "--port", "PORT"))
            )

    async def _trouble(self, client: Client) -> str:
        longest = await client.max_model_len(ANSWER_WITHIN_S)
        await client.resume(ANSWER_WITHIN_S)  # a run that died may have left it paused
        await client.probe(np.zeros(2, np.int32), self._rollout.stall_timeout_s)
        if longest < self._max_tokens:
            return f"takes {longest} tokens of prompt and response, and the run {self._max_tokens}"
        if self._sends:
            trial = self._cargo({"trial": torch.zeros(1)})
            await client.receive_cargo(trial, TRIAL_TIMEOUT_S, is_trial=True)
            return ""
        directory = str(self._weights_directory)
        sees = (await client.call("sees", ANSWER_WITHIN_S, directory=directory))[0]
        return "" if sees == "True" else f"does not see the run's directory, {directory}"

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        """What a coroutine returns that runs on the servers' loop."""
        with self._closing:  # else it may reach a loop that is about to stop, and wait for ever
            if self._is_closed:
                work.close()
                raise RuntimeError("the engine was closed meanwhile")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise RuntimeError("the engine was closed meanwhile") from None
        finally:
            future.cancel()  # after Ctrl-C

    async def _stop(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._fleet:
            await self._fleet.close()

    # weights

    @property
    def _sends(self) -> bool:
        """Over the network, instead of writing files."""
        return self._rollout.weight_transfer != "files"

    @property
    def _weights_directory(self) -> Path:
        return self._run_dir / "engine" / "weights"

    def _write(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Weights:
        sent: Digests = {}
        path = self._weights_directory / f"version_{version}"
        config, dtype = read_hf_config(self._path), getattr(torch, self._dtype)
        megatron_to_hf.write(digested(weights, sent), config, dtype, self._path, path)
        return Weights(path, version, sent)

    def _keep(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Weights:
        """A copy in host memory: a server that is lost gets it when it is back."""
        sent: Digests = {}
        tensors = {
            name: tensor.detach().to("cpu", copy=True) for name, tensor in digested(weights, sent)
        }
        return Weights(self._path, version, sent, self._cargo(tensors))

    def _cargo(self, tensors: dict[str, Tensor]) -> Cargo:
        backend, num_workers = self._rollout.weight_transfer, self._rollout.tensor
        device = self._device if backend == "nccl" else torch.device("cpu")
        return Cargo(tensors, backend, device, num_workers)

    def _remove_old_weights(self) -> None:
        written = sorted(self._weights_directory.iterdir(), key=lambda path: path.stat().st_mtime)
        for path in written[:-KEPT_VERSIONS]:
            shutil.rmtree(path, ignore_errors=True)

    # questions

    def _question(self, problem: Problem, sampling: Sampling, number: int) -> Question:
        room = self._max_tokens - len(problem.prompt_tokens)
        params = sampling_params(sampling, number, room, self._stop_ids)
        return Question(problem.prompt_tokens.tolist(), params)

    def _response(self, answer: Answer, seed: int) -> Response:
        tokens = np.array(answer.token_ids, np.int32)
        logp = np.array([token.logprob for token in answer.logprobs.content], np.float32)
        assert len(tokens) == len(logp), "vLLM returned another number of log-probabilities"
        return Response(
            tokens=tokens,
            logp=logp,
            finish=answer.finish_reason,
            text=self._tokenizer.decode(tokens, skip_special_tokens=True),
            seed=seed + answer.index,
            version=min(number_of(span.version) for span in answer.weight_versions),
        )
