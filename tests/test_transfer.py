"""Weights sent to the workers of a server: all of them, in every dtype, or an error in time."""

import multiprocessing
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from megatron_nft.rollout import transfer
from megatron_nft.rollout.transfer import Cargo, Sender, SendError, address_towards, received

CPU = torch.device("cpu")
Weights = list[tuple[str, Tensor]]


def _tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "larger than a bucket": random(60, 50),
        "transposed": random(30, 20).t(),
        "a scale": random(dtype=torch.float32),
        "float32": random(7, 3, dtype=torch.float32),
        "fp8": random(9, dtype=torch.float8_e4m3fn),
        "empty": random(0, 4),
        "odd": random(3),
    }


TENSORS = _tensors()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _sender(num_workers: int = 1, timeout_s: float = 60.0) -> Sender:
    return Sender(Cargo(TENSORS, "gloo", CPU, num_workers), "127.0.0.1", timeout_s)


def _receive(
    sender: Sender, rank: int = 1, num_workers: int = 1, timeout_s: float = 60.0
) -> Weights:
    return list(received(**sender.address, timeout_s=timeout_s, rank=rank, num_workers=num_workers))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_every_worker_gets_what_was_sent(num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BUCKET_BYTES", 4096)
    sender = _sender(num_workers)
    ranks = range(1, num_workers + 1)
    with ThreadPoolExecutor(num_workers) as pool:
        found = list(pool.map(lambda rank: _receive(sender, rank, num_workers), ranks))
    sender.sent.result()
    for weights in found:
        assert [name for name, _ in weights] == list(TENSORS)
        for (_, theirs), ours in zip(weights, TENSORS.values(), strict=True):
            assert (theirs.dtype, theirs.shape) == (ours.dtype, ours.shape)
            assert _bytes(theirs) == _bytes(ours)


def test_buckets_are_of_one_dtype_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BUCKET_BYTES", 4096)
    names = [[name for name, _ in bucket] for bucket in transfer._in_buckets(TENSORS)]
    first, second, *others = names
    assert (first, second) == (["larger than a bucket"], ["transposed"])
    assert others == [["a scale", "float32"], ["fp8"], ["empty", "odd"]]


def test_nothing_to_send_is_sent_too() -> None:
    sender = Sender(Cargo({}, "gloo", CPU, 1), "127.0.0.1", 60.0)
    assert _receive(sender) == []
    sender.sent.result()


def test_workers_that_do_not_come_are_given_up() -> None:
    with pytest.raises(SendError, match="workers did not come"):
        _sender(timeout_s=0.2).sent.result(timeout=10)
    sender = _sender()
    sender.give_up()
    with pytest.raises(SendError, match="workers did not come"):
        sender.sent.result(timeout=10)


def test_another_number_of_workers_is_named() -> None:
    sender = _sender(num_workers=2)
    with pytest.raises(RuntimeError, match=r"has 1 workers, and the run sends weights to 2"):
        _receive(sender, num_workers=1)
    sender.give_up()


def test_a_sender_that_is_silent_is_not_waited_for() -> None:
    sender = _sender(num_workers=2)  # the other worker does not come
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)no gloo group .* GLOO_SOCKET_IFNAME"):
        _receive(sender, num_workers=2, timeout_s=5.0)
    assert time.monotonic() - started < 30
    sender.give_up()


def test_no_weights_are_kept_by_a_failure() -> None:
    tensor = torch.zeros(3)
    kept = weakref.ref(tensor)
    sender = Sender(Cargo({"w": tensor}, "gloo", CPU, 1), "127.0.0.1", 0.2)
    del tensor
    with pytest.raises(SendError):
        sender.sent.result(timeout=10)
    deadline = time.monotonic() + 10
    while kept() is not None:  # until the thread has ended
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert sender._store is None


def test_workers_hear_of_a_sender_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, whoever keeps the error."""
    kept = RuntimeError("out of memory")

    def broadcast(group: object, whole: Tensor, timeout: object) -> None:
        if threading.current_thread().name == "weights":
            raise kept
        real(group, whole, timeout)

    real = transfer._broadcast
    monkeypatch.setattr(transfer, "_broadcast", broadcast)
    sender, started = _sender(), time.monotonic()
    with pytest.raises(RuntimeError):
        _receive(sender)
    with pytest.raises(SendError, match="out of memory"):
        sender.sent.result(timeout=10)
    assert time.monotonic() - started < 20


def _die_after_one(address: dict[str, object]) -> None:
    next(received(**address, timeout_s=60.0, rank=1, num_workers=1))
    os._exit(0)


@pytest.mark.processes
def test_a_server_that_dies_meanwhile_is_seen_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BUCKET_BYTES", 1 << 20)
    large = {str(i): torch.zeros(1 << 18) for i in range(200)}  # more than sockets hold
    sender = Sender(Cargo(large, "gloo", CPU, 1), "127.0.0.1", 600.0)
    process = multiprocessing.get_context("spawn").Process(
        target=_die_after_one, args=(sender.address,)
    )
    process.start()
    started = time.monotonic()
    with pytest.raises(SendError, match="did not get through"):
        sender.sent.result(timeout=120)
    process.join()
    assert time.monotonic() - started < 120


def test_the_address_is_the_one_on_the_way_there() -> None:
    assert address_towards("http://server") == "127.0.0.1"  # a socket of this machine
    assert address_towards("http://127.0.0.1:8000") == "127.0.0.1"
    assert address_towards("http://localhost:8000") in ("127.0.0.1", "::1")
