"""Weights from this process's memory to the workers of one vLLM server, over the network.

Sender and workers meet at a store of the sender's; a collective group of their own then carries the
tensors, in buckets, and the store tells what each bucket holds. A server's group is nobody else's:
when it dies, the others get their weights all the same.
"""

import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from math import prod
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoints_conversion.buckets import BUCKET_BYTES, buckets

LOOK_EVERY_S = 0.02
NUM_WORKERS = "number of workers"  # a key
BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"  # torch's variable
_environment_lock = threading.Lock()  # there is a thread a server
Layout = list[tuple[str, list[int], str]]  # of a bucket's tensors: name, shape, dtype


class SendError(RuntimeError):
    """Weights did not get through to a server."""


@dataclass(frozen=True)
class Cargo:
    """Whole tensors in host memory, and how they travel."""

    tensors: dict[str, Tensor]
    backend: str  # gloo | nccl
    device: torch.device  # that they leave from: the CPU for gloo, a GPU for nccl
    num_workers: int  # of each server


class Sender:
    """One journey to one server, in a thread of its own.

    Args:
        host: the address of this machine that the server can reach.
        timeout_s: that each wait may take: for the workers, and for a bucket to get through. How
            long NCCL may take to connect is NCCL's affair.

    Raises:
        RuntimeError: there is no place to meet at that address.
    """

    def __init__(self, cargo: Cargo, host: str, timeout_s: float) -> None:
        self.sent: Future[None] = Future()  # a SendError, or None once all is sent
        self._timeout = timedelta(seconds=timeout_s)
        self._is_given_up = threading.Event()
        self._store: dist.Store | None = dist.TCPStore(
            host, 0, cargo.num_workers + 1, True, self._timeout, wait_for_workers=False
        )
        self.address = {"host": host, "port": self._store.port, "backend": cargo.backend}
        self.sent.set_running_or_notify_cancel()
        threading.Thread(target=self._run, args=(cargo,), name="weights", daemon=True).start()

    def give_up(self) -> None:
        """Stop before the next bucket."""
        self._is_given_up.set()

    def _run(self, cargo: Cargo) -> None:
        trouble = "the thread ended"
        try:
            self._send(cargo, self._store)
            trouble = ""
        except RuntimeError as error:
            trouble = str(error) or type(error).__name__
            let_go(error)
        finally:  # whoever waits hears of it in any case
            if trouble:
                self._store = None  # else kept: the workers may still have to read the last keys
                self.sent.set_exception(SendError(f"weights did not get through: {trouble}"))
            else:
                self.sent.set_result(None)

    def _send(self, cargo: Cargo, store: dist.Store) -> None:
        store.set(NUM_WORKERS, str(cargo.num_workers))
        self._wait_for(store, [_arrival(rank) for rank in range(1, cargo.num_workers + 1)])
        number = -1
        with (
            _beside_other_work(cargo.device),
            _group(cargo.backend, store, 0, cargo.num_workers + 1, self._timeout) as group,
        ):
            for number, bucket in enumerate(_in_buckets(cargo.tensors)):
                if self._is_given_up.is_set():
                    raise RuntimeError("given up")
                layout = [(name, list(t.shape), str(t.dtype)) for name, t in bucket]
                whole = torch.cat([t.reshape(-1) for _, t in bucket]).to(cargo.device)
                store.set(str(number), json.dumps(layout))
                _broadcast(group, whole, self._timeout)
            store.set(str(number + 1), "[]")

    def _wait_for(self, store: dist.Store, keys: list[str]) -> None:
        deadline = time.monotonic() + self._timeout.total_seconds()
        while not store.check(keys):
            if self._is_given_up.is_set() or time.monotonic() > deadline:
                raise RuntimeError("the server's workers did not come for them")
            time.sleep(LOOK_EVERY_S)


def received(
    host: str, port: int, backend: str, timeout_s: float, rank: int, num_workers: int
) -> Iterator[tuple[str, Tensor]]:
    """What a Sender sends, on the device that the backend carries it to.

    Args:
        rank: of this worker among the receivers, from 1.

    Raises:
        RuntimeError: the sender is gone, sent nothing for `timeout_s`, or sends to others.
    """
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(host, port, num_workers + 1, False, timeout)
    if (expected := int(store.get(NUM_WORKERS))) != num_workers:
        raise RuntimeError(
            f"this server has {num_workers} workers, and the run sends weights to {expected} "
            "(rollout.tensor)"
        )
    store.set(_arrival(rank), "")
    device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else "cpu"
    number = 0
    with _group(backend, store, rank, num_workers + 1, timeout) as group:
        while layout := json.loads(store.get(str(number))):
            sizes = [prod(shape) for _, shape, _ in layout]
            dtype = getattr(torch, layout[0][2].removeprefix("torch."))
            whole = torch.empty(sum(sizes), dtype=dtype, device=device)
            _broadcast(group, whole, timeout)
            for (name, shape, _), tensor in zip(layout, whole.split(sizes), strict=True):
                yield name, tensor.view(shape)
            number += 1


def let_go(error: BaseException) -> None:
    """Free what an error's frames hold, a group among it: the others wait until it is gone."""
    traceback.clear_frames(error.__traceback__)


def address_towards(url: str) -> str:
    """This machine's address on the way to a server's; the local one for a server of its own.

    Raises:
        OSError: there is no such host, or no way to it.
    """
    place = urlsplit(url)
    if place.port is None:
        return "127.0.0.1"
    kind, *_, where = socket.getaddrinfo(place.hostname, place.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(kind, socket.SOCK_DGRAM) as way:
        way.connect(where)  # sends nothing
        return way.getsockname()[0]


def _in_buckets(tensors: dict[str, Tensor]) -> Iterator[Sequence[tuple[str, Tensor]]]:
    """In their order; of one dtype each."""
    for _, group in groupby(tensors.items(), key=lambda item: item[1].dtype):
        items = list(group)
        for part in buckets([t.nbytes for _, t in items], BUCKET_BYTES):
            yield items[part]


def _arrival(rank: int) -> str:
    return f"worker {rank} is there"


def _beside_other_work(device: torch.device) -> Any:
    """A stream of its own on a GPU: what the trainer computes meanwhile is not waited for."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


@contextmanager
def _group(
    backend: str, store: dist.Store, rank: int, size: int, timeout: timedelta
) -> Iterator[dist.ProcessGroup]:
    """Beside torch's default group: sender and workers have one of these each."""
    try:
        group = _new_group(backend, dist.PrefixStore("group", store), rank, size, timeout)
    except RuntimeError as error:
        raise RuntimeError(
            f"no {backend} group of trainer and workers: {error}; where a machine has several "
            f"networks, {backend.upper()}_SOCKET_IFNAME names the one to use, on either side"
        ) from error
    with ExitStack() as on_failure:
        on_failure.callback(group.abort)  # without waiting for a member that is lost
        yield group
        on_failure.pop_all()
    group.shutdown()  # NCCL's has memory of the GPU


def _new_group(
    backend: str, store: dist.Store, rank: int, size: int, timeout: timedelta
) -> dist.ProcessGroup:
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    with _errors_left_to_wait():
        return dist.ProcessGroupNCCL(store, rank, size, options)


@contextmanager
def _errors_left_to_wait() -> Iterator[None]:
    """A group made meanwhile has no watchdog of torch's, which would end this process with it."""
    with _environment_lock:
        before = os.environ.get(BLOCKING_WAIT)
        os.environ[BLOCKING_WAIT] = "1"
        try:
            yield
        finally:
            del os.environ[BLOCKING_WAIT]
            os.environ |= {} if before is None else {BLOCKING_WAIT: before}


def _broadcast(group: dist.ProcessGroup, whole: Tensor, timeout: timedelta) -> None:
    """From rank 0, as bytes: every backend carries those.

    With a timeout, `wait` returns when the bytes are there, also where they move on a stream.
    """
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    group.broadcast([whole.view(torch.uint8)], options).wait(timeout)
