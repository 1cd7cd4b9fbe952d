"""Weights that were corrupted, lost, old or misplaced stop the run, on every process, by name."""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import run
from torch import Tensor
from toys import VOCAB_SIZE, save_qwen2, save_tokenizer

from megatron_nft.config import Config, DataConfig, ModelConfig, RolloutConfig
from megatron_nft.rollout.engine import differences
from megatron_nft.rollout.handover import allowed, probe_texts
from megatron_nft.rollout.receiver import _rows

NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"


# pieces


def test_differences_are_named_by_kind() -> None:
    sent = {"a": "1", "b": "2", "c": "3"}
    assert differences(sent, dict(sent)) == ""
    assert differences(sent, {"a": "1", "b": "5", "d": "4"}) == (
        "other values: b (2 was sent, 5 arrived); missing: c; never sent: d"
    )


def test_many_names_are_counted() -> None:
    assert differences(dict.fromkeys("abc", "1"), {}) == "missing: a, b, c"
    assert differences(dict.fromkeys("abcde", "1"), {}) == "missing: a, b, c and 2 more"


@pytest.mark.parametrize(("room", "length"), [(1000, 32), (20, 19)])
def test_probe_texts_are_fixed_and_fit(room: int, length: int) -> None:
    config = Config(
        data=DataConfig(max_prompt_tokens=room - 4), rollout=RolloutConfig(max_response_tokens=4)
    )
    first, second = (probe_texts(config, VOCAB_SIZE) for _ in range(2))
    assert [text.tolist() for text in first] == [text.tolist() for text in second]
    assert {(len(text), text.dtype) for text in first} == {(length, np.dtype(np.int32))}
    assert 0 <= min(map(min, first)) < max(map(max, first)) < VOCAB_SIZE


def test_tolerances_are_the_engines() -> None:
    def tolerance(dtype: str, **options: Any) -> float:
        return allowed(Config(model=ModelConfig(dtype=dtype), rollout=RolloutConfig(**options)))

    assert tolerance("float32") < tolerance("bfloat16") < tolerance("bfloat16", quantization="fp8")
    assert tolerance("float32", quantization="fp8") == tolerance("bfloat16", quantization="fp8")
    assert tolerance("float32", quantization="fp8", probe_tolerance=0.7) == 0.7


def test_what_an_engine_keeps_as_rows_is_looked_up() -> None:
    assert _rows([(4, 8), (2, 8), (2, 8)], (8, 8)) == [4, 2, 2]  # queries, keys, values
    assert _rows([(67, 8)], (128, 8)) == [67]  # a vocabulary and its padding
    assert _rows([(4, 8), (2, 8), (2, 8)], (4, 8)) == []  # of one rank among two
    assert _rows([(8, 8)], (8, 4)) == []  # a row-parallel one's
    assert _rows([(8, 8)], (0,)) == []  # packed away
    assert _rows([None], (8,)) == []  # a scale, which nobody sent


# two processes, each with a replica and an engine


class Broken:
    """An engine whose weights go wrong on the way, or after it took them."""

    def __init__(
        self,
        engine: Any,
        on_way: Callable[[Iterable[tuple[str, Tensor]]], Iterator[tuple[str, Tensor]]] = iter,
        after: Callable[[Any], None] = lambda engine: None,
        off_by: float = 0.0,
    ) -> None:
        self.engine, self.on_way, self.after, self.off_by = engine, on_way, after, off_by
        self.held = engine.held

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Any:
        received = self.engine.load_weights(self.on_way(weights), version)
        self.after(self.engine)
        return received

    def probe(self, texts: Any) -> Any:
        probed = self.engine.probe(texts)
        return {n: [f + np.float32(self.off_by) for f in found] for n, found in probed.items()}


def _without(name: str, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((n, t) for n, t in weights if n != name)


def _from(old: dict[str, Tensor], weights: Iterable[tuple[str, Tensor]]) -> Iterator[Any]:
    return ((n, old[n]) for n, _ in weights)


def _overwrite(name: str, engine: Any) -> None:
    def double(model: torch.nn.Module) -> None:
        model.get_parameter(name).data.mul_(2)

    engine._llm.apply_model(double)


def _hand_over_in_many_ways(path: Path) -> dict[str, Any]:
    """What comes of it on this rank, by what was wrong."""
    from transformers import AutoTokenizer

    from checkpoints_conversion import hf_to_megatron
    from checkpoints_conversion.hf_files import read_hf_config
    from checkpoints_conversion.stream import stream
    from megatron_nft.policy import parallel
    from megatron_nft.policy.step import Policy
    from megatron_nft.rollout.colocated import ColocatedEngine
    from megatron_nft.rollout.handover import hand_over

    options = RolloutConfig(max_response_tokens=12, max_sequences=32, temperature=0.7)
    config = Config(model=ModelConfig(path=str(path), dtype="float32"), rollout=options)
    parallel.initialize(config.parallel, seed=0)
    hf_config = read_hf_config(path)
    policy = Policy(config, hf_config, partial(hf_to_megatron.load, path=path, hf_config=hf_config))
    tokenizer = AutoTokenizer.from_pretrained(path)
    engine = ColocatedEngine(path, tokenizer, options, "float32", max_tokens=64, seed=0)
    is_second = torch.distributed.get_rank() == 1
    found: dict[str, Any] = {}

    def attempt(what: str, **wrong: Any) -> None:
        """Whatever is wrong, is wrong on the second process alone."""
        try:
            broken = Broken(engine, **wrong) if is_second else engine
            found[what] = hand_over(policy, broken, len(found))
        except RuntimeError as error:
            found[what] = str(error)

    old = {name: tensor.clone() for name, tensor in stream(policy.chunks, hf_config)}
    with torch.no_grad():
        for parameter in policy.chunks[0].parameters():
            parameter.mul_(0.97)
    attempt("nothing")
    [down] = [
        p for n, p in policy.chunks[0].named_parameters() if n.endswith("1.mlp.linear_fc2.weight")
    ]
    bits = down.data.view(torch.int32)
    bits[3, 5] ^= is_second  # the least bit of one number of one replica
    attempt("a flipped bit")
    bits[3, 5] ^= is_second
    attempt("a lost tensor", on_way=partial(_without, DOWN))
    attempt("old weights", on_way=partial(_from, old))
    attempt("a tensor overwritten", after=partial(_overwrite, NORM))
    attempt("not a number", off_by=np.nan)
    attempt("nothing again")
    return found


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """By what was wrong: what every process got."""
    path = tmp_path_factory.mktemp("handover") / "model"
    save_tokenizer(save_qwen2(path, hidden_size=128))  # vLLM on a CPU: heads of 32
    ranks = run(_hand_over_in_many_ways, 2, path)
    return {what: [rank[what] for rank in ranks] for what in ranks[0]}


@pytest.mark.processes
@pytest.mark.parametrize("what", ["nothing", "nothing again"])
def test_right_weights_are_found_right(attempts: dict[str, list[Any]], what: str) -> None:
    first, second = attempts[what]
    assert first == second  # over both engines
    assert 0 < first["probe_delta_mean"] <= first["probe_delta_max"] <= 1e-5
    assert first["weights_version"] == list(attempts).index(what)
    assert 3e5 < first["weights_gib"] * 2**30 < 2e6


@pytest.mark.processes
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a flipped bit", rf"engine 1 does not hold .*: other values: {DOWN} \(.* was sent, .*\)$"),
        ("a lost tensor", rf"engine 1 does not hold .*: missing: {DOWN}$"),
        ("old weights", r"engine 1 does not hold .*: other values: model\.embed.* and 24 more$"),
        ("a tensor overwritten", rf"by engine 1 differ .* in the mean .*misread some: {NORM}$"),
        (
            "not a number",
            r"by engine 1 differ from the policy's by nan in the mean .*Which, cannot",
        ),
    ],
)
def test_wrong_weights_stop_every_process(
    attempts: dict[str, list[Any]], what: str, message: str
) -> None:
    first, second = attempts[what]
    assert first == second
    version = list(attempts).index(what)
    assert re.search(rf"^weights version {version}: .*{message}", first), first
