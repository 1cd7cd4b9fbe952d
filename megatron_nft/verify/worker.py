"""One verifier worker: `python -m megatron_nft.verify.worker TIMEOUT_S MAX_BYTES NUM_ANSWERS`.

On stdin one JSON line per task, see tasks.py; on stdout "ready" once everything is imported, then
per task one line, written at once: its judgement, or "timeout", or what is wrong with the rule.

The process imports math-verify once and forks a judge that does the work. A judge that misses a
deadline is killed by its own alarm, one that has judged NUM_ANSWERS ends, and the next one is
forked in milliseconds, where a fresh process would import for seconds. A judge that ends in any
other way ends the worker.
"""

import gc
import os
import resource
import signal
import sys
from itertools import islice

from megatron_nft.rollout.groups import Verdict
from megatron_nft.verify import answers, tasks
from megatron_nft.verify.rules import RuleError, rule_of

RECYCLED = 3  # exit code of a judge that has judged enough


def main() -> None:
    """Answer until stdin ends; needs no help to end in time, even if the parent is gone."""
    timeout_s, max_bytes, num_answers = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    replies = _private_stdout()
    warm_up = answers.judge(r"\boxed{\frac{2}{4}}", "0.5")
    assert warm_up is Verdict.CORRECT, warm_up
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    gc.freeze()  # the judges' collections should not copy what they share with this process
    _discard(2)  # the parser's remarks on what models write
    os.write(replies, tasks.READY)
    while status := _judge_status(timeout_s, num_answers, replies):
        if os.WIFSIGNALED(status):
            os.write(replies, tasks.TIMEOUT)


def _judge_status(timeout_s: float, num_answers: int, replies: int) -> int:
    """Fork a judge and wait for its end; 0 where that was the end of stdin, or a crash."""
    pid = os.fork()
    if pid == 0:
        is_recycled = _judge_some(timeout_s, num_answers, replies)
        os._exit(RECYCLED if is_recycled else 0)
    _, status = os.waitpid(pid, 0)
    was_late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
    is_recycled = os.WIFEXITED(status) and os.WEXITSTATUS(status) == RECYCLED
    return status if was_late or is_recycled else 0


def _judge_some(timeout_s: float, num_answers: int, replies: int) -> bool:
    """False at the end of stdin. Lines are read one by one: the next judge goes on behind them."""
    num_judged = 0
    for line in islice(iter(_read_line, b""), num_answers):
        task = tasks.decode_task(line)
        # The default action of SIGALRM ends the process at any point, even in the middle of one
        # multiplication of huge integers, where no Python code would run.
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        reply = _reply(task)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(replies, reply)
        num_judged += 1
    return num_judged == num_answers


def _read_line() -> bytes:
    """One task: there is never more than one in the pipe, so that nothing is left in a buffer."""
    return sys.stdin.buffer.readline()


def _reply(task: tasks.Task) -> bytes:
    rule = rule_of(task.rule)
    try:
        if task.is_reading:
            return tasks.encode_judgement(rule.read(task.gold))
        return tasks.encode_judgement(rule.decide(task.extracted, task.gold))
    except RuleError as error:
        return tasks.encode_trouble(str(error))


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
