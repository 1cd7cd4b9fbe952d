"""One run at a time in a run's directory: two would write over each other's checkpoints."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import Self

FILE_NAME = "lock"
PATIENCE_S = 180.0  # a run may take a moment to end; a dead machine's locks on NFS 90 s
LOOK_EVERY_S = 0.5
HAS_NONE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # some network file systems

logger = logging.getLogger("megatron_nft")


class DirectoryLock:
    """Held by this process from now on, until `close` or its end, however it ends.

    A POSIX record lock: forked children have no part in it, and it reaches to other machines where
    the file system's locks do.

    Raises:
        ValueError: another process holds it, for longer than `patience_s`; it says which.
    """

    def __init__(self, directory: Path, patience_s: float = PATIENCE_S) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / FILE_NAME
        self._file = self._path.open("a+b", buffering=0)
        deadline, is_told = time.monotonic() + patience_s, False
        while not self._take():
            if time.monotonic() > deadline:
                holder = self._holder()
                self._file.close()
                raise ValueError(
                    f"run_dir: another run is at work in {directory}: {holder}; wait for its end, "
                    "or end it, or give this one a run_dir of its own"
                )
            if not is_told:
                logger.warning("waiting for the run in %s to end: %s", directory, self._holder())
                is_told = True
            time.sleep(LOOK_EVERY_S)
        self._sign()

    def _take(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HAS_NONE:
                logger.warning("%s: no lock (%s); let no other run in here", self._path, error)
                return True
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True

    def _holder(self) -> str:
        with contextlib.suppress(OSError):
            return self._path.read_text().strip() or "unknown"
        return "unknown"

    def _sign(self) -> None:
        """For people; a full disk does not matter here."""
        with contextlib.suppress(OSError):
            self._file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            who = f"process {os.getpid()} on {socket.gethostname()}, since {since}\n"
            self._file.write(who.encode())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
