"""Run a function in several gloo processes, as torchrun would, and get its results."""

import multiprocessing
import multiprocessing.connection
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def run(function: Callable[..., Any], num_processes: int, *args: Any) -> list[Any]:
    """`function(*args)` on every rank under torchrun's environment; the ranks' results in order."""
    context = multiprocessing.get_context("spawn")
    port = _free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(num_processes)]
    processes = [
        context.Process(target=_child, args=(rank, num_processes, port, pipe[1], function, args))
        for rank, pipe in enumerate(pipes)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()  # the child's end alone: when it dies, the pipe ends
    try:
        return _receive_all([pipe[0] for pipe in pipes])
    finally:
        for process in processes:
            process.join(timeout=20)
            process.kill()


def _receive_all(pipes: list[Connection]) -> list[Any]:
    """Whoever fails first is the one to report: the others only lose their peer."""
    results: dict[Connection, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for pipe in pipes if pipe not in results]
        for pipe in multiprocessing.connection.wait(waiting, timeout=1.0):
            try:
                results[pipe] = pipe.recv()
            except EOFError:
                rank = pipes.index(pipe)
                raise RuntimeError(f"rank {rank} failed; its traceback is on stderr") from None
    return [results[pipe] for pipe in pipes]


def _child(
    rank: int,
    num_processes: int,
    port: int,
    pipe: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    pipe.send(function(*args))


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
