"""Run a command for as long as its caller lives: `python -m … PID_OF_CALLER COMMAND…`.

The command and all that it starts are one process group, that of the guard. The kernel could tell
a child of its parent's end too (PR_SET_PDEATHSIG), but means the thread that started it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time

LOOK_EVERY_S = 0.5
POLITENESS_S = 10.0  # vLLM ends in 1 to 3 s, and then leaves nothing in /dev/shm
AFTERMATH_S = 2.0  # for what a command that ended by itself has left behind


def main(caller: int, command: list[str]) -> None:
    """Never returns: the group ends with the command or with the caller."""
    # A polite end is the command's to carry out; unlike SIG_IGN, a handler is not passed on to it.
    signal.signal(signal.SIGTERM, lambda *_: None)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while process.poll() is None and os.getppid() == caller:
        time.sleep(LOOK_EVERY_S)
    os.killpg(0, signal.SIGTERM)
    if process.returncode is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLITENESS_S)
    else:
        print(f"ended with exit code {process.returncode}", flush=True)
        time.sleep(AFTERMATH_S)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
