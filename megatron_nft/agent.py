"""torchrun, but for its exit code: that of the first training process to fail, not always 1.

So whoever started it can tell a run that is to be started again (notice.REQUEUE) or that stalled
(watchdog.EXIT_CODE) from one that failed, on every node alike.
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

SIGNALLED = 128  # a shell's code for a process that signal N ended is 128 + N


def main(arguments: list[str]) -> int:
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else SIGNALLED - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
