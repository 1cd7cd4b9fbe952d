"""What is asked of one vLLM server, and what it says, over HTTP.

Tokens go in and out (`/inference/v1/generate`), with the same parameters as the in-process engine's
and without a tokenizer, and the server tells which weights sampled what.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np

from megatron_nft.rollout.engine import Digests
from megatron_nft.rollout.receiver import Received
from megatron_nft.rollout.transfer import Cargo, Sender, address_towards

CONNECT_TIMEOUT_S = 10.0
SLACK_S = 10.0  # for a worker's own error to come before the end of the server's time
TOKENS_COUNTER = "vllm:generation_tokens_total"
Params = Mapping[str, Any]  # vLLM's SamplingParams


class ServerError(RuntimeError):
    """The server, not the question, is the trouble: another one may answer."""


class Unreachable(ServerError):  # noqa: N818
    """No answer at all, which may pass."""


class Probability(msgspec.Struct):
    """Of one token."""

    logprob: float


class Logprobs(msgspec.Struct):
    """Of an answer's tokens."""

    content: list[Probability]


class Span(msgspec.Struct):
    """Tokens that were sampled by the weights of one version."""

    version: str


class Answer(msgspec.Struct):
    """One of a question's answers, as the server tells it."""

    index: int
    finish_reason: str
    token_ids: list[int]
    logprobs: Logprobs
    weight_versions: list[Span]


class Generated(msgspec.Struct):
    """What `/inference/v1/generate` returns, in part; `prompt_logprobs` by token."""

    choices: list[Answer]
    prompt_logprobs: list[dict[int, Probability] | None] | None = None


class Client:
    """One server's, by its `http://HOST:PORT` or by the socket that it listens on.

    Raises:
        Unreachable: it could not be connected to, did not answer in time or hung up.
        ServerError: it failed (HTTP 5xx).
        RuntimeError: it refused what it was asked (HTTP 4xx); nobody else would take it either.
    """

    def __init__(self, url: str = "", socket: Path | None = None) -> None:
        self.url = url.rstrip("/") or "http://server"
        # A connection a request: one that rested for 5 s is hung up by the server, sometimes
        # just when it is used again.
        if socket:
            connector = aiohttp.UnixConnector(str(socket), limit=0, force_close=True)
        else:
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(connector=connector)

    async def close(self) -> None:
        await self._session.close()

    async def generate(
        self, tokens: Sequence[int], params: Params, timeout_s: float | None = None
    ) -> Generated:
        """Cancelling it makes the server drop the question."""
        body = {"token_ids": list(tokens), "sampling_params": dict(params)}
        raw = await self._request("POST", "/inference/v1/generate", timeout_s, json=body)
        return msgspec.json.decode(raw, type=Generated)

    async def probe(self, text: np.ndarray, timeout_s: float) -> np.ndarray:
        """float32 [T − 1]: see Engine.probe."""
        params = {"max_tokens": 1, "prompt_logprobs": 0, "logprobs": 0, "temperature": 1.0}
        params["detokenize"] = False
        tokens = text.tolist()
        found = (await self.generate(tokens, params, timeout_s)).prompt_logprobs[1:]
        logp = [p[t].logprob for p, t in zip(found, tokens[1:], strict=True)]
        return np.array(logp, np.float32)

    async def num_generated(self, timeout_s: float) -> float:
        """Tokens sampled since the server started."""
        raw = await self._request("GET", "/metrics", timeout_s)
        lines = raw.decode().splitlines()
        counts = [float(li.rsplit(" ", 1)[1]) for li in lines if li.startswith(TOKENS_COUNTER)]
        if not counts:
            raise ServerError(f"{self.url}/metrics has no {TOKENS_COUNTER}: its log stats are off")
        return math.fsum(counts)

    async def check_health(self, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        await self._request("GET", "/health", timeout_s)

    async def max_model_len(self, timeout_s: float) -> int:
        """Prompt and response together."""
        raw = await self._request("GET", "/v1/models", timeout_s)
        return int(msgspec.json.decode(raw)["data"][0]["max_model_len"])

    async def call(self, method: str, timeout_s: float, **kwargs: Any) -> list[Any]:
        """A method of its workers; what each returned, as a str if no dict or list."""
        body = {"method": method, "kwargs": kwargs}
        raw = await self._request("POST", "/collective_rpc", timeout_s, json=body)
        return msgspec.json.decode(raw)["results"]

    async def receive(self, path: Path, timeout_s: float) -> list[Digests]:
        """Have the workers take a directory's weights: what each received."""
        return await self._received("receive", timeout_s, path=str(path))

    async def receive_cargo(
        self, cargo: Cargo, timeout_s: float, *, is_trial: bool = False
    ) -> list[Digests]:
        """Send the workers tensors: what each received. In a trial they are no weights.

        Args:
            timeout_s: for each wait on the way, and, with SLACK_S, for the whole.
        """
        method = "try_to_receive" if is_trial else "receive_sent"
        sender = await self._sender(cargo, timeout_s)
        sending = asyncio.wrap_future(sender.sent)
        asked = self._received(method, timeout_s + SLACK_S, within_s=timeout_s, **sender.address)
        receiving = asyncio.create_task(asked)
        try:
            await asyncio.wait([receiving, sending], return_when=asyncio.FIRST_COMPLETED)
            # one that cannot send is told why by its workers, sometimes
            await asyncio.wait([receiving], timeout=SLACK_S if _has_failed(sending) else None)
            troubles = [str(f.exception()) for f in (sending, receiving) if _has_failed(f)]
            if receiving.done() and not isinstance(receiving.exception(), ServerError):
                return receiving.result()  # or it was refused, as it would be by every server
            raise ServerError(f"{self.url}: {'; '.join(troubles)}")
        finally:
            sender.give_up()
            sending.cancel()
            receiving.cancel()

    async def _received(self, method: str, timeout_s: float, **kwargs: Any) -> list[Digests]:
        received: list[Received] = await self.call(method, timeout_s, **kwargs)
        for worker, each in enumerate(received):
            if each["failure"]:
                raise ServerError(f"worker {worker} did not take the weights: {each['failure']}")
        return [each["digests"] for each in received]

    async def _sender(self, cargo: Cargo, timeout_s: float) -> Sender:
        try:
            address = await asyncio.to_thread(address_towards, self.url)
            return Sender(cargo, address, timeout_s)
        except (OSError, RuntimeError) as error:
            raise Unreachable(f"no way for weights to {self.url}: {error}") from error

    async def pause(self, timeout_s: float) -> None:
        """Sample nothing, but lose nothing; new questions wait too."""
        await self._request("POST", "/pause?mode=keep", timeout_s)

    async def resume(self, timeout_s: float) -> None:
        await self._request("POST", "/resume", timeout_s)

    async def name_weights(self, version: int, timeout_s: float) -> None:
        """Have tokens marked with the version of their weights from now on."""
        body = {"new_version": str(version)}
        await self._request("POST", "/update_weight_version", timeout_s, json=body)

    async def forget_prefixes(self, timeout_s: float) -> None:
        """Empty the cache of the old weights' keys and values.

        What is being sampled computes its own anew.
        """
        path = "/reset_prefix_cache?reset_running_requests=true"
        raw = await self._request("POST", path, timeout_s)
        if not msgspec.json.decode(raw)["success"]:
            raise ServerError(f"{self.url} did not reset its prefix cache")

    async def _request(
        self, method: str, path: str, timeout_s: float | None = None, **options: Any
    ) -> bytes:
        timeout = aiohttp.ClientTimeout(timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        try:
            async with self._session.request(
                method, self.url + path, timeout=timeout, **options
            ) as response:
                body = await response.read()
        except TimeoutError as error:
            raise Unreachable(f"{path} did not answer within {timeout_s} s") from error
        except aiohttp.ClientError as error:
            raise Unreachable(f"{path}: {error or type(error).__name__}") from error
        if response.status >= 500:
            raise ServerError(f"{path}: HTTP {response.status}: {body.decode(errors='replace')}")
        if response.status >= 400:
            raise RuntimeError(
                f"{self.url}{path}: HTTP {response.status}: {body.decode(errors='replace')}"
            )
        return body


def _has_failed(future: asyncio.Future[Any]) -> bool:
    return future.done() and future.exception() is not None
