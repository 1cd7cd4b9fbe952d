"""Questions asked of real vLLM servers, which die, hang and take new weights meanwhile.

Two servers are shared by the tests, which run in their order; each leaves them alive.
"""

import asyncio
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from processes import run
from toys import VOCAB_SIZE, save_qwen2, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints_conversion.digest import digest
from megatron_nft.config import ParallelConfig, RolloutConfig
from megatron_nft.notice import Interrupted
from megatron_nft.rollout import servers, transfer
from megatron_nft.rollout.client import Client, ServerError, Unreachable
from megatron_nft.rollout.engine import Answers, Sampling
from megatron_nft.rollout.fleet import Member
from megatron_nft.rollout.groups import Problem, Response
from megatron_nft.rollout.remote import RemoteEngine
from megatron_nft.rollout.servers import ServerProcess

pytestmark = [pytest.mark.processes, pytest.mark.alone]

NUM_PROBLEMS = 40
MAX_TOKENS = 2048  # answers of the random models have some 70 tokens, one has 700
SAMPLING = Sampling(answers=4, temperature=1.0, top_p=0.99, max_tokens=400, seed=5)
OPTIONS = RolloutConfig(
    engine="remote",
    num_servers=2,
    max_sequences=16,
    in_flight_updates=True,
    stall_timeout_s=5.0,
    start_timeout_s=300.0,
)
# of a server that the run does not start; nobody hangs there, and the others start again meanwhile
GIVEN = replace(OPTIONS, tensor=2, stall_timeout_s=120.0)
TEXTS = [np.arange(2, 12, dtype=np.int32), np.arange(30, 37, dtype=np.int32)]
Samples = dict[tuple[int, int], list[int]]


def _problems() -> list[Problem]:
    rng = np.random.default_rng(0)
    return [
        Problem(str(i), rng.integers(2, VOCAB_SIZE, 3 + i % 5).astype(np.int32), "1", "toy")
        for i in range(NUM_PROBLEMS)
    ]


PROBLEMS = _problems()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    paths = [tmp_path_factory.mktemp("models") / str(seed) for seed in range(3)]
    sizes = {"hidden_size": 128, "max_position_embeddings": MAX_TOKENS}  # vLLM: heads of 32
    for seed, path in enumerate(paths):
        save_tokenizer(save_qwen2(path, seed=seed, **sizes))
    return paths


def _start(path: Path, run_dir: Path, options: RolloutConfig = OPTIONS) -> RemoteEngine:
    tokenizer = AutoTokenizer.from_pretrained(path)
    return RemoteEngine(path, tokenizer, options, "float32", MAX_TOKENS, seed=0, run_dir=run_dir)


@pytest.fixture(scope="module")
def engine(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteEngine]:
    engine = _start(models[0], tmp_path_factory.mktemp("run"))
    groups = [member.process._process.pid for member in engine._fleet.members]
    yield engine
    groups += [member.process._process.pid for member in engine._fleet.members]
    engine.close()
    assert [p for group in groups for p in _group(group)] == []


def _group(group: int) -> list[psutil.Process]:
    """The processes of a group, in the order of their start."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return sorted(found, key=lambda process: process.create_time())


def _generate(engine: RemoteEngine, sampling: Sampling = SAMPLING) -> Answers:
    return engine.generate(PROBLEMS, [1.0] * NUM_PROBLEMS, sampling)


def _tokens(answers: Answers) -> Samples:
    return {(i, k): r.tokens.tolist() for i, rs in answers for k, r in enumerate(rs)}


def _load(engine: RemoteEngine, path: Path, version: int) -> None:
    """Give weights, and check what arrived by digest and by what the servers say of texts."""
    state = AutoModelForCausalLM.from_pretrained(path).state_dict()
    received = engine.load_weights(iter(state.items()), version)
    sent = {name: digest(tensor) for name, tensor in state.items()}
    assert received == {m.name: sent for m in engine._fleet.live}
    _check_probe(engine, path)


def _check_probe(engine: RemoteEngine, path: Path) -> None:
    probed = engine.probe(TEXTS)
    assert list(probed) == [m.name for m in engine._fleet.live]
    for found in probed.values():
        for ours, text in zip(found, TEXTS, strict=True):
            np.testing.assert_allclose(ours, _logp(path, text), atol=1e-4)


def _logp(path: Path, text: np.ndarray) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(path)
    tokens = torch.from_numpy(text.astype(np.int64))
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0].numpy()


def _until_all_live(engine: RemoteEngine) -> None:
    _until(lambda: len(engine._fleet.live) == len(engine._fleet.members))


def _until(is_so: Callable[[], bool], timeout_s: float = OPTIONS.start_timeout_s) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"did not come about within {timeout_s} s"
        time.sleep(0.2)


def _colocated(path: Path) -> list[tuple[int, list[tuple[list[int], np.ndarray, str, str, int]]]]:
    from megatron_nft.policy import parallel
    from megatron_nft.rollout.colocated import ColocatedEngine

    parallel.initialize(ParallelConfig(), seed=0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    options = replace(OPTIONS, engine="colocated")
    engine = ColocatedEngine(path, tokenizer, options, "float32", MAX_TOKENS, 0)
    answers = _generate(engine)
    return [
        (i, [(r.tokens.tolist(), r.logp, r.finish, r.text, r.seed) for r in rs])
        for i, rs in answers
    ]


@pytest.fixture(scope="module")
def samples(engine: RemoteEngine) -> Samples:
    """By the first model."""
    return _tokens(_generate(engine))


def test_samples_are_those_of_the_colocated_engine(
    engine: RemoteEngine, models: list[Path]
) -> None:
    answers = _generate(engine)
    for (i, ours), (j, theirs) in zip(answers, run(_colocated, 1, models[0])[0], strict=True):
        assert i == j
        for r, (tokens, logp, *rest) in zip(ours, theirs, strict=True):
            assert r.tokens.tolist() == tokens
            assert [r.finish, r.text, r.seed] == rest
            np.testing.assert_allclose(r.logp, logp, atol=1e-5)
    assert {r.finish for _, rs in answers for r in rs} == {"stop", "length"}
    assert {r.version for _, rs in answers for r in rs} == {-1}


def test_enough_questions_end_a_batch(engine: RemoteEngine, samples: Samples) -> None:
    answers = _generate(engine, replace(SAMPLING, finish_fraction=0.25))
    assert len(answers) == NUM_PROBLEMS // 4
    assert _tokens(answers).items() <= samples.items()
    for member in engine._fleet.members:  # they drop the others
        _until(lambda member=member: _num_running(engine, member) == 0, timeout_s=10)


def _num_running(engine: RemoteEngine, member: Member) -> float:
    text = engine._call(member.client._request("GET", "/metrics", 10.0)).decode()
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(names))


def test_a_question_that_is_refused_is_an_error(engine: RemoteEngine) -> None:
    with pytest.raises(RuntimeError, match=r"HTTP 400.*temperature"):
        _generate(engine, replace(SAMPLING, temperature=-1.0))
    assert len(engine._fleet.live) == 2


def test_new_weights_reach_every_server(
    engine: RemoteEngine, models: list[Path], samples: Samples
) -> None:
    _check_probe(engine, models[0])
    _load(engine, models[1], version=1)
    changed = _generate(engine)
    assert _tokens(changed) != samples
    assert {r.version for _, rs in changed for r in rs} == {1}
    _load(engine, models[0], version=2)
    assert _tokens(_generate(engine)) == samples
    _load(engine, models[0], version=3)
    kept = sorted(path.name for path in engine._weights_directory.iterdir())
    assert kept == ["version_2", "version_3"]


def test_weights_that_change_during_a_batch_lose_no_question(
    engine: RemoteEngine, models: list[Path]
) -> None:
    with ThreadPoolExecutor(1) as thread:
        batch = thread.submit(_generate, engine, replace(SAMPLING, top_p=1.0))
        time.sleep(1.0)
        assert not batch.done()
        _load(engine, models[1], version=4)
        answers = batch.result()
    assert len(_tokens(answers)) == NUM_PROBLEMS * SAMPLING.answers
    assert {r.version for _, rs in answers for r in rs} == {3, 4}
    changed = [(PROBLEMS[i], r) for i, rs in answers for r in rs if r.version == 3]
    longest = sorted(changed, key=lambda pair: -len(pair[1].tokens))[:10]
    switches = [_switch(problem, r, models[0], models[1]) for problem, r in longest]
    assert any(0 < at < len(r.tokens) for at, (_, r) in zip(switches, longest, strict=True))
    _load(engine, models[0], version=5)


def _switch(problem: Problem, response: Response, old: Path, new: Path) -> int:
    """How many of the tokens have the old model's log-probabilities; the others have the new one's.

    That of a token after the change is by the new model from its first layer on, of all before it.
    """
    text = np.concatenate([problem.prompt_tokens, response.tokens])
    start = len(problem.prompt_tokens) - 1
    is_old, is_new = (
        np.abs(_logp(path, text)[start:] - response.logp) < 1e-3 for path in (old, new)
    )
    at = len(is_old) if is_old.all() else int(is_old.argmin())
    assert is_new[at:].all()
    return at


def test_a_byte_that_changes_on_the_way_is_seen(
    engine: RemoteEngine, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = RemoteEngine._write

    def write_and_spoil(*args: object) -> object:
        weights = write(*args)
        file = weights.path / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        return weights

    state = AutoModelForCausalLM.from_pretrained(models[0]).state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(RemoteEngine, "_write", write_and_spoil)
        received = engine.load_weights(iter(state.items()), 6)
    sent = {name: digest(tensor) for name, tensor in state.items()}
    for digests in received.values():
        assert len([name for name in sent if digests[name] != sent[name]]) == 1
    _load(engine, models[0], version=7)


@pytest.fixture
def sending(engine: RemoteEngine, monkeypatch: pytest.MonkeyPatch) -> RemoteEngine:
    """The same servers; weights come over the network."""
    monkeypatch.setattr(engine, "_rollout", replace(OPTIONS, weight_transfer="gloo"))
    return engine


def test_weights_sent_reach_every_server(
    sending: RemoteEngine, models: list[Path], samples: Samples
) -> None:
    written = sorted(sending._weights_directory.iterdir())
    with ThreadPoolExecutor(1) as thread:
        batch = thread.submit(_generate, sending)
        time.sleep(1.0)
        assert not batch.done()
        _load(sending, models[1], version=8)
        answers = batch.result()
    assert len(_tokens(answers)) == NUM_PROBLEMS * SAMPLING.answers
    assert {r.version for _, rs in answers for r in rs} == {7, 8}
    _load(sending, models[0], version=9)
    assert _tokens(_generate(sending)) == samples
    assert sorted(sending._weights_directory.iterdir()) == written


def test_a_server_that_hangs_costs_no_question(engine: RemoteEngine, models: list[Path]) -> None:
    _load(engine, models[2], version=10)  # not those that the servers started from
    restarts = engine.counts["engine_restarts"]
    children = _server(engine, 1).children(recursive=True)  # the engine; the server still speaks
    samples = _lose_during_a_batch(engine, children, signal.SIGSTOP)
    assert "questions and no token for" in engine._fleet.members[1].trouble
    _until_all_live(engine)
    assert engine.counts["engine_restarts"] == restarts + 1
    _check_probe(engine, models[2])
    assert _tokens(_generate(engine)) == samples


def test_a_server_that_dies_costs_no_question(sending: RemoteEngine, models: list[Path]) -> None:
    """And it does not join before it computes what the others do."""
    _load(sending, models[1], version=11)
    fleet, member = sending._fleet, sending._fleet.members[1]
    texts, expected = fleet._probed
    restarts = sending.counts["engine_restarts"]
    with pytest.raises(ServerError, match=r"probe differ by nan"):
        sending._call(fleet._compare(member, texts, [e * np.nan for e in expected]))
    fleet._probed = texts, [e + 0.01 for e in expected]
    samples = _lose_during_a_batch(sending, [_server(sending, 1)], signal.SIGKILL)
    _until(lambda: "probe differ by 1.00e-02 in the mean" in member.trouble)
    assert fleet.live == [fleet.members[0]]
    fleet._probed = texts, expected
    _until_all_live(sending)
    assert sending.counts["engine_restarts"] == restarts + 1
    _check_probe(sending, models[1])
    assert _tokens(_generate(sending)) == samples


def _lose_during_a_batch(
    engine: RemoteEngine, victims: list[psutil.Process], how: signal.Signals
) -> Samples:
    """The batch's, which are those of a batch before."""
    samples = _tokens(_generate(engine))
    before = engine.counts["questions_asked_again"]
    threading.Timer(1.0, lambda: [os.kill(p.pid, how) for p in victims]).start()
    assert _tokens(_generate(engine)) == samples
    assert engine.counts["questions_asked_again"] > before
    return samples


def _server(engine: RemoteEngine, number: int) -> psutil.Process:
    """The server itself, behind its guard."""
    return _group(engine._fleet.members[number].process._process.pid)[1]


def test_a_server_that_dies_while_weights_are_sent(
    sending: RemoteEngine, models: list[Path], samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one gets them at once. The last of the tests that share the servers."""
    victim, once = _server(sending, 1).pid, threading.Lock()

    def broadcast_and_kill(*args: object) -> None:
        if once.acquire(blocking=False):  # one thread sends to each server
            os.kill(victim, signal.SIGKILL)
        broadcast(*args)

    broadcast = transfer._broadcast
    monkeypatch.setattr(transfer, "_broadcast", broadcast_and_kill)
    state = AutoModelForCausalLM.from_pretrained(models[0]).state_dict()
    begun = time.monotonic()
    received = sending.load_weights(iter(state.items()), 13)
    assert time.monotonic() - begun < 30  # of start_timeout_s=300
    sent = {name: digest(tensor) for name, tensor in state.items()}
    assert received == {"server 0": sent}
    assert _tokens(_generate(sending)) == samples


def _serve(path: Path, port: int, log: Path) -> None:
    """A server as a user would start it, on a port, for as long as this process lives."""
    where = ("--host", "127.0.0.1", "--port", port)
    process = ServerProcess(log, servers.environment(GIVEN))
    process.start(servers.command(path, GIVEN, "float32", MAX_TOKENS, 0, *where))
    time.sleep(600)


def _pause(address: str) -> bool:
    """Whether it could be done already."""

    async def pause() -> bool:
        client = Client(address)
        try:
            await client.pause(10.0)
        except Unreachable:
            return False
        finally:
            await client.close()
        return True

    return asyncio.run(pause())


@pytest.fixture
def given(models: list[Path], tmp_path: Path) -> Iterator[tuple[str, BaseProcess]]:
    """The address of a server, and the process that started it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    owner = context.Process(target=_serve, args=(models[0], port, tmp_path / "server.log"))
    owner.start()
    yield f"http://127.0.0.1:{port}", owner
    owner.kill()


def _broken_once(function: Callable[..., None]) -> Callable[..., None]:
    calls = iter([RuntimeError("broken by the test")])

    def broken(*args: object) -> None:
        for error in calls:
            raise error
        function(*args)

    return broken


def test_a_server_of_another_process_that_dies(
    models: list[Path],
    samples: Samples,
    tmp_path: Path,
    given: tuple[str, BaseProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is used by its address, and ends when the process that started it is killed."""
    address, owner = given
    options = replace(GIVEN, servers=[address])
    _until(lambda: _pause(address))  # as a run leaves it that dies while weights change
    engine = _start(models[0], tmp_path, options)
    processes = psutil.Process(owner.pid).children(recursive=True)
    assert len(processes) >= 5  # guard, server, engine, two workers
    found = _tokens(_generate(engine))
    num_same = sum(found[key] == tokens for key, tokens in samples.items())
    assert num_same >= len(samples) - 2  # halves of a sum are rounded otherwise than the whole
    _load(engine, models[1], version=1)
    with pytest.raises(ValueError, match=r"(?s)has 2 workers, and the run sends weights to 1"):
        _start(models[0], tmp_path, replace(options, weight_transfer="gloo", tensor=1))
    sending = _start(models[0], tmp_path, replace(options, weight_transfer="gloo"))
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "_broadcast", _broken_once(transfer._broadcast))
        _load(sending, models[2], version=2)  # both workers are in step after a failure of both
    assert sending.counts["engine_restarts"] == 1
    _load(sending, models[1], version=3)
    threading.Timer(0.2, sending.abandon).start()
    with pytest.raises(Interrupted):
        _generate(sending)
    sending.close()
    with pytest.raises(ValueError, match=r"(?s)takes 2048 tokens.*--max-model-len 4096"):
        RemoteEngine(models[0], engine._tokenizer, options, "float32", 4096, 0, tmp_path)
    engine._fleet._start_timeout_s = 3.0
    threading.Timer(1.0, owner.kill).start()
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=f"(?s)every engine is lost.*{address}"):
        _generate(engine)
    assert time.monotonic() - begun < 30
    engine.close()
    assert psutil.wait_procs(processes, timeout=20)[1] == []
