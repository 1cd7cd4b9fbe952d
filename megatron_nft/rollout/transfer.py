"""Weights from this process's memory to the workers of one vLLM server, over the network.

Sender and workers meet at a store of the sender's; a collective group of their own then carries the
tensors, in buckets, and the store tells what each bucket holds. A server's group is nobody else's:
when it dies, the others get their weights all the same.
"""

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from math import prod
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoints_conversion.buckets import BUCKET_BYTES, buckets

LOOK_EVERY_S = 0.02
NUM_WORKERS = "number of workers"  # a key
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
        timeout_s: for each bucket.
    """

    def __init__(self, cargo: Cargo, host: str, timeout_s: float) -> None:
        self.sent: Future[None] = Future()  # a SendError, or None once all is sent
        self._cargo, self._timeout = cargo, timedelta(seconds=timeout_s)
        self._is_given_up = threading.Event()
        self._store = dist.TCPStore(
            host, 0, cargo.num_workers + 1, True, self._timeout, wait_for_workers=False
        )
        self.address = {"host": host, "port": self._store.port, "backend": cargo.backend}
        self.sent.set_running_or_notify_cancel()
        threading.Thread(target=self._run, name="weights", daemon=True).start()

    def give_up(self) -> None:
        """Stop where it stands."""
        self._is_given_up.set()

    def _run(self) -> None:
        try:
            self._send()
        except RuntimeError as error:
            self.sent.set_exception(SendError(f"weights did not get through: {error}"))
        else:
            self.sent.set_result(None)

    def _send(self) -> None:
        self._store.set(NUM_WORKERS, str(self._cargo.num_workers))
        self._wait_for([_arrival(rank) for rank in range(1, self._cargo.num_workers + 1)])
        num_members = self._cargo.num_workers + 1
        group = _group(self._cargo.backend, self._store, 0, num_members, self._timeout)
        number = -1
        for number, bucket in enumerate(_in_buckets(self._cargo.tensors)):
            if self._is_given_up.is_set():
                raise RuntimeError("given up")
            layout = [(name, list(t.shape), str(t.dtype)) for name, t in bucket]
            whole = torch.cat([t.reshape(-1) for _, t in bucket]).to(self._cargo.device)
            self._store.set(str(number), json.dumps(layout))
            _broadcast(group, whole)
        self._store.set(str(number + 1), "[]")

    def _wait_for(self, keys: list[str]) -> None:
        deadline = time.monotonic() + self._timeout.total_seconds()
        while not self._store.check(keys):
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
    group = _group(backend, store, rank, num_workers + 1, timeout)
    device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else "cpu"
    number = 0
    while layout := json.loads(store.get(str(number))):
        sizes = [prod(shape) for _, shape, _ in layout]
        dtype = getattr(torch, layout[0][2].removeprefix("torch."))
        whole = torch.empty(sum(sizes), dtype=dtype, device=device)
        _broadcast(group, whole)
        for (name, shape, _), tensor in zip(layout, whole.split(sizes), strict=True):
            yield name, tensor.view(shape)
        number += 1


def address_towards(url: str) -> str:
    """This machine's address on the way to a server's; the local one for a server of its own."""
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


def _group(
    backend: str, store: dist.Store, rank: int, size: int, timeout: timedelta
) -> dist.ProcessGroup:
    """Beside torch's default group: sender and workers have one of these each."""
    store = dist.PrefixStore("group", store)
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)


def _broadcast(group: dist.ProcessGroup, whole: Tensor) -> None:
    """From rank 0, as bytes: every backend carries those."""
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    group.broadcast([whole.view(torch.uint8)], options).wait()
