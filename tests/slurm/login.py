"""A login node of the tests' Slurm: sshd on this machine, for as long as a `with` lasts.

It has keys of its own; to the machine's own configuration a line of known hosts is added and taken
out again.
"""

import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

from cluster import Slurm

PORT = 16822
PROGRAMS = ("/usr/sbin/sshd", "ssh", "ssh-keygen", "rsync")
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


def can_log_in() -> bool:
    return all(shutil.which(program) for program in PROGRAMS)


class Login:
    """A context manager; `ssh` is for a cluster file."""

    def __init__(self, folder: Path, slurm: Slurm) -> None:
        self.folder, self._slurm = folder, slurm
        self.ssh = f"ssh: {{host: 127.0.0.1, port: {PORT}, user: root, "
        self.ssh += f"identity: {folder}/me, job_dir: {folder}/jobs}}\n"

    def __enter__(self) -> Self:
        for name in ("host", "me"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(words, check=True)
        environment = self._slurm.environment
        names = {"conf": environment["SLURM_CONF"], "path": environment["PATH"]}
        text = CONF.format(port=PORT, folder=self.folder, **names)
        (self.folder / "sshd_config").write_text(text)
        Path("/run/sshd").mkdir(exist_ok=True)
        command = [PROGRAMS[0], "-D", "-e", "-f", str(self.folder / "sshd_config")]
        with (self.folder / "sshd.log").open("wb") as log:
            self._sshd = subprocess.Popen(command, stderr=log)
        self._known = f"[127.0.0.1]:{PORT} {(self.folder / 'host.pub').read_text()}"
        self._know([self._known])
        self._wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._sshd.terminate()
        self._sshd.wait()
        self._know([])

    def _know(self, lines: list[str]) -> None:
        """ssh looks in its user's own home, whatever HOME is."""
        file = Path("~root/.ssh/known_hosts").expanduser()
        file.parent.mkdir(mode=0o700, exist_ok=True)
        before = file.read_text().splitlines(keepends=True) if file.exists() else []
        others = [line for line in before if not line.startswith(f"[127.0.0.1]:{PORT} ")]
        file.write_text("".join([*others, *lines]))

    def _wait(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", PORT)) == 0:
                    return
            assert time.monotonic() < deadline, (self.folder / "sshd.log").read_text()
            time.sleep(0.1)
