"""A login node that jobs are submitted from over SSH, by the ssh and rsync of this machine."""

import contextlib
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from launch.cluster import Ssh

TIMEOUT_S = 60


def check(ssh: Ssh) -> None:
    """Raise ValueError where it cannot be reached as nemo-run will reach it."""
    if missing := [name for name in ("ssh", "rsync") if not shutil.which(name)]:
        raise ValueError(f"ssh.host needs {', '.join(missing)} on this machine; install them")
    _run(ssh, "command -v rsync >/dev/null || { echo there is no rsync there >&2; exit 1; }")


def copy(ssh: Ssh, file: Path, to: PurePosixPath) -> None:
    """Copy a small file there, into a folder that is made if need be."""
    folder = shlex.quote(str(to.parent))
    _run(ssh, f"mkdir -p {folder} && cat >{shlex.quote(str(to))}", file.read_bytes())


@contextlib.contextmanager
def told(ssh: Ssh) -> Iterator[None]:
    """Turn what nemo-run's SSH raises into ValueErrors; it exits where it may not log in."""
    if not ssh.host:
        yield
        return
    from invoke.exceptions import UnexpectedExit

    try:
        yield
    except UnexpectedExit as error:
        text = error.result.stderr.strip() or error.result.stdout.strip()
        raise ValueError(f"ssh.host {ssh.host}: {error.result.command}: {text}") from None
    except SystemExit:
        raise ValueError(f"ssh.host {ssh.host} does not let {ssh.user} in") from None


def key_of(ssh: Ssh) -> str:
    """The private key's file; empty: ssh finds one."""
    return str(Path(ssh.identity).expanduser()) if ssh.identity else ""


def _run(ssh: Ssh, command: str, given: bytes = b"") -> None:
    words = ["ssh", "-p", str(ssh.port), f"{ssh.user}@{ssh.host}", command]
    if ssh.identity:
        words[1:1] = ["-i", key_of(ssh)]
    try:
        done = subprocess.run(words, input=given, capture_output=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ValueError(f"ssh.host {ssh.host} says nothing for {TIMEOUT_S} s") from None
    if done.returncode:
        text = done.stderr.decode(errors="replace").strip()
        raise ValueError(f"ssh.host {ssh.host}: {text or f'ssh ended with {done.returncode}'}")
