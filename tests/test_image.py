"""The Dockerfile: hadolint's rules, and what it must agree on with the rest of the project."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text()


def instructions(name: str) -> list[str]:
    """Arguments of each instruction of a name, continued lines joined."""
    whole = re.sub(r"\\\n", " ", TEXT)
    return [line.split(" ", 1)[1] for line in whole.splitlines() if line.startswith(f"{name} ")]


def test_hadolint_has_no_complaint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    bad = subprocess.run([hadolint, "-"], input="FROM ubuntu\n", capture_output=True, text=True)
    assert bad.returncode != 0  # it looks at all


def test_what_it_installs_is_pinned() -> None:
    [apex] = [value for value in instructions("ARG") if value.startswith("APEX=")]
    assert re.fullmatch(r"APEX=[0-9a-f]{40}", apex)
    assert "CUDA=13.0.2" in instructions("ARG")
    assert "cu13" in (ROOT / "pyproject.toml").read_text()  # Transformer Engine's build
    assert "pip install apex" not in TEXT


def test_it_has_what_nccl_looks_for_at_run_time() -> None:
    """Else several nodes speak by TCP, and nothing says so."""
    before = TEXT.split("AS build")[0]
    assert "libibverbs1" in before
    assert "ibverbs-providers" in before


def test_it_copies_what_is_there_and_nothing_of_the_machine() -> None:
    for words in instructions("COPY"):
        for source in words.split()[:-1]:
            if not source.startswith(("--from", "/")):
                assert (ROOT / source).exists(), source
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    ignored = [line for line in lines if not line.startswith("#")]
    assert ignored[0] == "*"  # models and data may lie in the checkout
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages <= allowed
    assert not allowed & {"models", "data", "runs", ".git"}


def test_it_runs_as_nobody_in_particular_and_holds_no_secret() -> None:
    assert instructions("USER")[-1] == "1100:1100"
    values = " ".join(instructions("ENV") + instructions("ARG"))
    assert not re.search(r"(?i)token|key|secret|password", values)
    [check] = instructions("HEALTHCHECK")
    assert check.endswith('CMD ["megatron-nft", "doctor"]')
