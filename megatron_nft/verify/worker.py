"""One verifier worker: `python -m megatron_nft.verify.worker TIMEOUT_S`, started by `pool`.

On stdin one JSON line per answer, [extracted, gold]; on stdout "ready" once everything is
imported, then per answer one line, written at once: its verdict, or "timeout".

The process imports math-verify once and forks a judge that does the work. A judge that misses a
deadline is killed by its own alarm and the next one forked in milliseconds, where a fresh process
would import for seconds. A judge that ends in any other way ends the worker.
"""

import gc
import json
import os
import resource
import signal
import sys

from megatron_nft.rollout.groups import Verdict
from megatron_nft.verify.answers import equivalent

MAX_MEMORY_BYTES = 2 * 2**30


def main() -> None:
    """Answer until stdin ends; needs no help to end in time, even if the parent is gone."""
    timeout_s = float(sys.argv[1])
    replies = _private_stdout()
    warm_up = equivalent(r"\boxed{\frac{2}{4}}", "0.5")
    assert warm_up is Verdict.CORRECT, warm_up
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    gc.freeze()  # the judges' collections should not copy what they share with this process
    _discard(2)  # the parser's remarks on what models write
    os.write(replies, b"ready\n")
    while _judge_was_late(timeout_s, replies):
        os.write(replies, b"timeout\n")


def _judge_was_late(timeout_s: float, replies: int) -> bool:
    """Fork a judge and wait for its end; False where that was the end of stdin, or a crash."""
    pid = os.fork()
    if pid == 0:
        _judge_all(timeout_s, replies)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM


def _judge_all(timeout_s: float, replies: int) -> None:
    for line in sys.stdin.buffer:
        extracted, gold = json.loads(line)
        # The default action of SIGALRM ends the process at any point, even in the middle of one
        # multiplication of huge integers, where no Python code would run.
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        verdict = equivalent(extracted, gold)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(replies, verdict.value.encode() + b"\n")


def _private_stdout() -> int:
    """Keep stdout for the verdicts: whatever a library prints must not look like one."""
    replies = os.dup(1)
    _discard(1)
    return replies


def _discard(fd: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, fd)
    os.close(null)


if __name__ == "__main__":
    main()
