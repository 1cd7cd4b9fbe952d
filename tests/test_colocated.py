"""The engine inside the training processes: its weights are the policy's, after every update."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import run
from safetensors.torch import load_file
from toys import VOCAB_SIZE, save_qwen2, save_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_nft.config import Config, ModelConfig, ParallelConfig, RolloutConfig
from megatron_nft.policy import host
from megatron_nft.rollout.groups import Problem

NUM_PROBLEMS = 5
TEXT = ((7 * np.arange(60)) % VOCAB_SIZE).astype(np.int32)


def _problems() -> list[Problem]:
    rng = np.random.default_rng(0)
    return [
        Problem(str(i), rng.integers(2, VOCAB_SIZE, 3 + i).astype(np.int32), "1", "toy")
        for i in range(NUM_PROBLEMS)
    ]


def _policy_and_engine(
    path: Path, options: RolloutConfig, layout: ParallelConfig
) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    from checkpoints_conversion import hf_to_megatron
    from checkpoints_conversion.hf_files import read_hf_config
    from megatron_nft.policy import parallel
    from megatron_nft.policy.step import Policy
    from megatron_nft.rollout.colocated import ColocatedEngine

    config = Config(
        model=ModelConfig(path=str(path), dtype="float32"), parallel=layout, rollout=options
    )
    parallel.initialize(config.parallel, seed=0)
    hf_config = read_hf_config(path)
    fill = partial(hf_to_megatron.load, path=path, hf_config=hf_config)
    policy = Policy(config, hf_config, fill)
    tokenizer = AutoTokenizer.from_pretrained(path)
    return policy, ColocatedEngine(path, tokenizer, options, "float32", max_tokens=64, seed=0)


def _sample_after_updates(
    path: Path, tensor: int, num_updates: int, rollout_tensor: int = 1
) -> list[dict]:
    """Change the policy, hand it over, sample, sleep; as often as asked."""
    from megatron_nft.policy.packing import Sequence
    from megatron_nft.rollout.engine import Sampling
    from megatron_nft.rollout.handover import hand_over

    options = RolloutConfig(
        max_response_tokens=12, max_sequences=32, temperature=0.7, tensor=rollout_tensor
    )
    policy, engine = _policy_and_engine(path, options, ParallelConfig(tensor=tensor))
    problems, found = _problems(), []
    for version in range(num_updates):
        with torch.no_grad():
            for parameter in policy.chunks[0].parameters():
                parameter.mul_(0.97 + 0.02 * version)
        hand_over(policy, engine, version)
        answered = engine.generate(
            problems, [1.0] * len(problems), Sampling(4, 0.7, 1.0, 12, seed=version)
        )
        engine.sleep()
        flat = [(problems[i], i, k, r) for i, rs in answered for k, r in enumerate(rs)]
        everything: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everything, flat)
        whole = [item for part in everything for item in part]
        sequences = [
            Sequence(p.prompt_tokens, r.tokens, r.logp, r.logp, True, 0.5) for p, _, _, r in whole
        ]
        logp = policy.logp(sequences)
        deltas = [np.abs(a - s.logp).max() for a, s in zip(logp, sequences, strict=True)]
        samples = {(i, k): r.tokens.tolist() for _, i, k, r in whole}
        own = {(i, k): r.tokens.tolist() for _, i, k, r in flat}
        found.append({"delta": float(max(deltas)), "samples": samples, "own": own})
    return found


@pytest.mark.processes
def test_engine_holds_the_policys_weights_after_every_update(tmp_path: Path) -> None:
    path = save_qwen2(tmp_path / "model", tied=True, hidden_size=128)  # vLLM: heads of 32
    save_tokenizer(path)
    together = run(_sample_after_updates, 2, path, 2, 3)[0]
    alone = run(_sample_after_updates, 1, path, 1, 3)[0]
    [split, other] = run(_sample_after_updates, 2, path, 1, 2, 2)  # one engine, two replicas
    for rank in (split, other):
        assert [found["own"] for found in rank] == [found["samples"] for found in alone[:2]]
    assert max(found["delta"] for found in split) <= 1e-4
    for ours, single in zip(together, alone, strict=True):
        assert ours["delta"] <= 1e-4
        assert single["delta"] <= 1e-4
        assert len(ours["samples"]) == 4 * NUM_PROBLEMS
        assert ours["samples"] == single["samples"]  # whatever the number of engines
    assert together[0]["samples"] != together[1]["samples"]


# sleep


def _sleep_and_wake(path: Path) -> dict[str, Any]:
    """What the engine and vLLM do, and which questions are refused, through a sleep."""
    from checkpoints_conversion.stream import stream
    from megatron_nft.rollout.engine import Sampling

    options = RolloutConfig(max_response_tokens=12, max_sequences=4)
    policy, engine = _policy_and_engine(path, options, ParallelConfig())
    calls: list[str] = []
    for name in ("sleep", "wake_up", "collective_rpc", "reset_prefix_cache"):
        setattr(engine._llm, name, _noting(calls, name, getattr(engine._llm, name)))

    def ask() -> Any:
        answers = engine.generate(_problems(), [1.0] * 5, Sampling(1, 1.0, 1.0, 12, seed=0))
        return [answer.tokens.tolist() for _, (answer,) in answers]

    def refused(question: Any) -> bool:
        try:
            question()
        except AssertionError:
            return True
        return False

    engine.load_weights(stream(policy.chunks, policy.hf_config), 0)
    found: dict[str, Any] = {"before": ask(), "version before": engine.version}
    found["awake"] = list(calls)
    calls.clear()
    found["metrics"] = engine.sleep()
    found["version asleep"] = engine.version
    found["refused"] = [refused(ask), refused(lambda: engine.probe([TEXT]))]
    engine.load_weights(stream(policy.chunks, policy.hf_config), 0)
    found |= {"after": ask(), "through sleep": list(calls)}
    cut = engine.generate(
        _problems(), [1.0] * 5, Sampling(2, 1.0, 1.0, 12, seed=0, finish_fraction=0.4)
    )
    found["cut"] = [(i, len(answers)) for i, answers in cut]
    found["left over"] = len(engine._llm.llm_engine.output_processor.parent_requests)
    engine.load_weights(stream(policy.chunks, policy.hf_config), 1)
    found["after a cut"] = ask()
    with pytest.raises(RuntimeError, match="broken off"):
        engine.load_weights(_broken_off(stream(policy.chunks, policy.hf_config)), 2)
    engine.load_weights(stream(policy.chunks, policy.hf_config), 3)
    return found | {"after a break": ask()}


def _broken_off(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Zeros, until a fused projection has its first third."""
    for name, tensor in weights:
        yield name, torch.zeros_like(tensor)
        if name.endswith("layers.1.self_attn.q_proj.weight"):
            raise RuntimeError("broken off")


def _noting(calls: list[str], name: str, function: Any) -> Any:
    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(" ".join((name, *map(str, args), *map(str, kwargs.get("tags", ())))))
        return function(*args, **kwargs)

    return noted


@pytest.mark.processes
def test_an_engine_sleeps_until_weights_come(tmp_path: Path) -> None:
    """Row 16 of field_failures as well: what a sleep gives back is measured, at every one."""
    path = save_tokenizer(save_qwen2(tmp_path / "model", hidden_size=128))
    [found] = run(_sleep_and_wake, 1, path)
    assert found["awake"] == ["collective_rpc receive", "reset_prefix_cache"]
    assert found["through sleep"] == [
        "sleep",
        "wake_up weights",
        "collective_rpc receive",
        "wake_up kv_cache",
        "reset_prefix_cache",
    ]
    assert found["refused"] == [True, True]
    assert (found["version before"], found["version asleep"]) == (0, -1)
    assert found["before"] == found["after"]
    assert 2 <= len(found["cut"]) < 5  # a step may finish several
    assert {num for _, num in found["cut"]} == {2}
    assert found["left over"] == 0
    assert found["after a cut"] == found["before"]
    assert found["after a break"] == found["before"]
    given_back, kept = found["metrics"].values()
    assert kept > 0.05  # this process, torch and vLLM
    assert abs(given_back) < 0.05 or host.has_cuda()  # a CPU host gives nothing back


# FP8


def _quantized_anew(path: Path, changed: Path) -> list[list[float]]:
    """Log-probabilities by an engine in FP8 of one directory's weights, then of another's."""
    from checkpoints_conversion import hf_to_megatron
    from megatron_nft.rollout.handover import hand_over

    options = RolloutConfig(max_response_tokens=12, max_sequences=32, quantization="fp8")
    policy, engine = _policy_and_engine(path, options, ParallelConfig())
    found = []
    for version, source in enumerate((path, changed)):
        hf_to_megatron.load(policy.chunks, source, policy.hf_config)
        hand_over(policy, engine, version)
        [(logp,)] = engine.probe([TEXT]).values()
        found.append(logp.tolist())
        engine.sleep()
    return found


def _logp_in_fp8(path: Path, is_quantized: bool = True) -> np.ndarray:
    """Of every token of the text but the first, by transformers' model in float32.

    Its weights are bfloat16's, and those of projections, row by row, the nearest of FP8's numbers
    times 1/448 of the row's largest.
    """
    weights = {
        name: w.bfloat16().float() for name, w in load_file(path / "model.safetensors").items()
    }
    for name, weight in weights.items():
        if name.endswith("_proj.weight") and is_quantized:
            scale = weight.abs().amax(1, keepdim=True) / 448
            weights[name] = (weight / scale).to(torch.float8_e4m3fn).float() * scale
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32)
    model.load_state_dict(weights)
    tokens = torch.from_numpy(TEXT.astype(np.int64))
    with torch.no_grad():
        logp = model(tokens[None]).logits[0].log_softmax(-1)
    return logp[:-1].gather(1, tokens[1:, None])[:, 0].numpy()


def _distance(logp: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.square(logp - other).mean()))


@pytest.mark.processes
@pytest.mark.skipif(host.fp8_rollout_trouble() is not None, reason=str(host.fp8_rollout_trouble()))
def test_fp8_engines_quantize_every_update(tmp_path: Path) -> None:
    """vLLM rounds activations too: that must cost no more than twice what rounding weights does."""
    sizes = {"hidden_size": 256, "intermediate_size": 384}
    paths = [save_qwen2(tmp_path / str(seed), seed=seed, **sizes) for seed in range(2)]
    save_tokenizer(paths[0])
    [found] = run(_quantized_anew, 1, *paths)
    for path, other, logp in zip(paths, paths[::-1], map(np.array, found), strict=True):
        served = _logp_in_fp8(path)
        cost = _distance(served, _logp_in_fp8(path, is_quantized=False))
        assert 0 < _distance(logp, served) <= 2 * cost
        assert _distance(logp, _logp_in_fp8(other)) > 5 * cost
