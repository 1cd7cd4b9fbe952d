"""A login node of the tests' Slurm: sshd on this machine, for as long as a `with` lasts.

It has keys and known hosts of its own; nothing of the machine's or its user's configuration is read
or changed.
"""

import shutil
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from cluster import Slurm

from megatron_nft.processes import end_with_parent

SSHD, SSH = "/usr/sbin/sshd", "/usr/bin/ssh"
CONF = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
PidFile {folder}/sshd.pid
AuthorizedKeysFile {folder}/me.pub
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
SetEnv SLURM_CONF={conf} PATH={path}
Subsystem sftp internal-sftp
"""
# first on the PATH, for rsync too: ssh reads its user's own files, whatever HOME is
WRAPPER = """#!/bin/sh
exec {ssh} -F none -o UserKnownHostsFile={folder}/known -o IdentitiesOnly=yes "$@"
"""


def trouble() -> str | None:
    """Why nobody can log in here."""
    missing = [name for name in (SSHD, SSH, "ssh-keygen", "rsync") if not shutil.which(name)]
    return f"no {', '.join(missing)}" if missing else None


class Login(ExitStack):
    """A context manager; `ssh` is for a cluster file. Begin it before what it may keep out."""

    def __init__(self, folder: Path, slurm: Slurm) -> None:
        super().__init__()
        self.folder, self._slurm = folder, slurm
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.ssh = f"ssh: {{host: 127.0.0.1, port: {self.port}, user: root, "
        self.ssh += f"identity: {folder}/me, job_dir: {folder}/jobs}}\n"

    def __enter__(self) -> Self:
        for name in ("host", "me"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(words, check=True)
        known = f"[127.0.0.1]:{self.port} {(self.folder / 'host.pub').read_text()}"
        (self.folder / "known").write_text(known)
        wrapper = self._slurm.folder / "bin" / "ssh"
        wrapper.write_text(WRAPPER.format(ssh=SSH, folder=self.folder))
        wrapper.chmod(0o755)
        self.callback(wrapper.unlink)
        self._start()
        return self

    def refusal(self) -> str:
        """Why root may not log in, as on machines where it has no password; else empty."""
        words = [str(self._slurm.folder / "bin" / "ssh"), "-o", "BatchMode=yes"]
        words += ["-i", f"{self.folder}/me", "-p", str(self.port), "root@127.0.0.1", "true"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        return done.stderr + (self.folder / "sshd.log").read_text() if done.returncode else ""

    def _start(self) -> None:
        environment = self._slurm.environment
        names = {"conf": environment["SLURM_CONF"], "path": environment["PATH"]}
        text = CONF.format(port=self.port, folder=self.folder, **names)
        (self.folder / "sshd_config").write_text(text)
        separated = Path("/run/sshd")  # where sshd wants an empty folder
        if not separated.exists():
            separated.mkdir()
            separated.chmod(0o755)
            self.callback(separated.rmdir)
        command = [SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")]
        with (self.folder / "sshd.log").open("wb") as log:
            sshd = subprocess.Popen(command, stderr=log, preexec_fn=end_with_parent)
        self.callback(sshd.wait)
        self.callback(sshd.terminate)
        deadline = time.monotonic() + 30
        while True:
            alive = sshd.poll() is None and time.monotonic() < deadline
            assert alive, (self.folder / "sshd.log").read_text()
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
