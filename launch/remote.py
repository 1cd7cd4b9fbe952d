"""A login node that jobs are submitted from over SSH, by the ssh and rsync of this machine.

nemo-run connects by paramiko, and copies by rsync; both have to get in without a question.
"""

import contextlib
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from launch.cluster import Ssh

TIMEOUT_S = 60


def check(ssh: Ssh, folder: PurePosixPath) -> None:
    """Make a folder there; ValueError where that, or what nemo-run will need, cannot be."""
    if missing := [name for name in ("ssh", "rsync") if not shutil.which(name)]:
        raise ValueError(f"ssh.host needs {', '.join(missing)} on this machine; install them")
    run(ssh, "command -v rsync >/dev/null || { echo there is no rsync there >&2; exit 1; }")
    run(ssh, f"mkdir -p {shlex.quote(str(folder))}")


def copy(ssh: Ssh, file: Path, to: PurePosixPath) -> None:
    """Copy a small file there."""
    run(ssh, f"cat >{shlex.quote(str(to))}", file.read_bytes())


@contextlib.contextmanager
def told(ssh: Ssh) -> Iterator[None]:
    """Turn what nemo-run's SSH raises into ValueErrors; it exits where it may not log in."""
    if not ssh.host:
        yield
        return
    from invoke.exceptions import UnexpectedExit
    from paramiko import SSHException

    try:
        yield
    except UnexpectedExit as error:
        text = error.result.stderr.strip() or error.result.stdout.strip()
        raise ValueError(f"ssh.host {ssh.host}: {error.result.command}: {text}") from error
    except (OSError, EOFError, SSHException) as error:
        raise ValueError(f"ssh.host {ssh.host}: {error!r}") from error
    except SystemExit:
        raise ValueError(f"ssh.host {ssh.host} does not let {ssh.user} in") from None


def key_of(ssh: Ssh) -> str:
    """The private key's file; empty: ssh finds one."""
    return str(Path(ssh.identity).expanduser()) if ssh.identity else ""


def run(ssh: Ssh, command: str, given: bytes = b"") -> str:
    """What a command prints there. Raises ValueError where it fails or nothing is to be reached."""
    words = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={TIMEOUT_S // 3}"]
    words += ["-i", key_of(ssh)] if ssh.identity else []
    words += ["-p", str(ssh.port)] if ssh.port else []
    words += ["--", f"{ssh.user}@{ssh.host}", command]
    try:
        done = subprocess.run(words, input=given, capture_output=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ValueError(f"ssh.host {ssh.host} says nothing for {TIMEOUT_S} s") from None
    if done.returncode:
        text = done.stderr.decode(errors="replace").strip()
        raise ValueError(f"ssh.host {ssh.host}: {text or f'ssh ended with {done.returncode}'}")
    return done.stdout.decode(errors="replace")
