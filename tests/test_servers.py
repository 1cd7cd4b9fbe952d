"""How servers are started, and what is made of their answers; none of these needs vLLM."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_nft.config import RolloutConfig
from megatron_nft.rollout import servers
from megatron_nft.rollout.client import Client, ServerError, Unreachable
from megatron_nft.rollout.engine import stop_ids
from megatron_nft.rollout.remote import RemoteEngine

OPTIONS = RolloutConfig(engine="remote", num_servers=2, tensor=2, max_sequences=8)


def test_command_has_what_decides_samples() -> None:
    command = servers.command(Path("/m"), OPTIONS, "float32", 100, 7, "--uds", Path("/s"))
    for name, value in {
        "--model": "/m",
        "--max-model-len": "100",
        "--max-num-seqs": "8",
        "--tensor-parallel-size": "2",
        "--logprobs-mode": "processed_logprobs",
        "--seed": "7",
        "--uds": "/s",
    }.items():
        assert command[command.index(name) + 1] == value
    assert "--tokens-only" in command
    assert "--quantization" not in command
    fp8 = servers.command(Path("/m"), RolloutConfig(quantization="fp8"), "bfloat16", 100, 7)
    assert fp8[fp8.index("--quantization") + 1] == "fp8_per_channel"


def test_environment_leaves_torchrun_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("MINE", "kept")
    found = servers.environment(OPTIONS, ["4", "5"])
    assert found["MINE"] == "kept"
    assert found["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert found["VLLM_SERVER_DEV_MODE"] == "1"
    assert str(servers.PACKAGE_ROOT) in found["PYTHONPATH"].split(os.pathsep)
    assert not {"RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & found.keys()
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in found


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU hosts share cores")
def test_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    for shares, threads in (((1,), "8"), ((2, 1), "3"), ((40,), "1")):  # of two workers each
        assert servers.environment(OPTIONS, (), *shares)["OMP_NUM_THREADS"] == threads


def test_gpus_come_after_those_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert servers.shares_of_gpus(OPTIONS, 8) == [["2", "3"], ["4", "5"]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9,8,7,6,5,4")
    assert servers.shares_of_gpus(OPTIONS, 6) == [["7", "6"], ["5", "4"]]
    assert servers.shares_of_gpus(OPTIONS, 0) == [[], []]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"rollout.num_servers=2.*8 GPUs.*has 6.*num_processes"):
        servers.shares_of_gpus(OPTIONS, 6)


def _process(tmp_path: Path) -> servers.ServerProcess:
    return servers.ServerProcess(tmp_path / "log", servers.environment(OPTIONS))


def _is_there(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def _until(condition: object, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600 if len(sys.argv) == 1 else float(sys.argv[1]))
"""


def _child(process: servers.ServerProcess) -> int:
    _until(lambda: "child" in process.log_end())
    return int(process.log_end().split()[1])


@pytest.mark.parametrize("polite", [False, True])
def test_a_process_ends_with_its_children(tmp_path: Path, polite: bool) -> None:
    process = _process(tmp_path)
    assert process.has_ended
    process.start([sys.executable, "-c", FAMILY])
    child = _child(process)
    assert not process.has_ended
    if polite:
        servers.end([process])
    else:
        process.kill()
    assert process.has_ended
    _until(lambda: not _is_there(child))


def test_children_of_a_process_that_ends_by_itself(tmp_path: Path) -> None:
    process = _process(tmp_path)
    process.start([sys.executable, "-c", FAMILY, "0"])
    child = _child(process)
    _until(lambda: process.has_ended)
    _until(lambda: not _is_there(child))
    assert "ended with exit code 0" in process.log_end()
    servers.end([process])


def test_a_process_ends_with_a_caller_that_is_killed(tmp_path: Path) -> None:
    caller = f"""
import sys, time
from pathlib import Path
from megatron_nft.rollout.guard import __file__ as guard
import os, subprocess
subprocess.Popen(
    [sys.executable, "-m", "megatron_nft.rollout.guard", str(os.getpid()), sys.executable, "-c",
     {FAMILY!r}], stdout=open({str(tmp_path / "log")!r}, "w"), process_group=0)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", caller], cwd=servers.PACKAGE_ROOT)
    child = _child(SimpleNamespace(log_end=lambda: _read(tmp_path / "log")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    _until(lambda: not _is_there(child))


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


class _Stub(BaseHTTPRequestHandler):
    """Answers with the status that the path asks for; a server of chat completions otherwise."""

    def do_GET(self) -> None:
        status = {"/health": self.server.health, "/v1/models": 200}.get(self.path, 404)
        body = json.dumps({"data": [{"max_model_len": 64}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def stub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Stub)
    server.health = 200
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


async def _check_health(url: str) -> None:
    client = Client(url)
    try:
        await client.check_health()
    finally:
        await client.close()


def test_errors_say_whose_fault_they_are(stub: ThreadingHTTPServer) -> None:
    asyncio.run(_check_health(stub.url))
    stub.health = 503
    with pytest.raises(ServerError, match="HTTP 503"):
        asyncio.run(_check_health(stub.url))
    stub.health = 422
    with pytest.raises(RuntimeError, match=r"HTTP 422: .*max_model_len") as refused:
        asyncio.run(_check_health(stub.url))
    assert not isinstance(refused.value, ServerError)
    with pytest.raises(Unreachable, match="Cannot connect"):
        asyncio.run(_check_health("http://127.0.0.1:1"))


def test_an_address_of_another_server(stub: ThreadingHTTPServer, tmp_path: Path) -> None:
    """The error has the command that starts one that would do."""
    tokenizer = SimpleNamespace(eos_token_id=1)
    options = RolloutConfig(engine="remote", servers=[stub.url])
    with pytest.raises(
        ValueError, match=r"(?s)127.0.0.1.*404.*VLLM_SERVER_DEV_MODE=1.*Receiver.*--port PORT"
    ):
        RemoteEngine(Path("/m"), tokenizer, options, "float32", 64, 0, tmp_path)


def test_stop_ids_are_the_tokenizers_and_the_models(tmp_path: Path) -> None:
    tokenizer = SimpleNamespace(eos_token_id=3)
    assert stop_ids(tmp_path, tokenizer) == [3]
    for configured, expected in ((5, [3, 5]), ([5, 3, 9], [3, 5, 9]), (None, [3])):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": configured}))
        assert stop_ids(tmp_path, tokenizer) == expected
