"""The engine inside the training processes: its weights are the policy's, after every update."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run
from toys import VOCAB_SIZE, save_qwen2, save_tokenizer

from megatron_nft.config import Config, ModelConfig, ParallelConfig, RolloutConfig
from megatron_nft.rollout.groups import Problem

NUM_PROBLEMS = 5


def _problems() -> list[Problem]:
    rng = np.random.default_rng(0)
    return [
        Problem(str(i), rng.integers(2, VOCAB_SIZE, 3 + i).astype(np.int32), "1", "toy")
        for i in range(NUM_PROBLEMS)
    ]


def _sample_after_updates(path: Path, tensor: int, num_updates: int) -> list[dict]:
    """Change the policy, hand it over, sample; as often as asked."""
    from transformers import AutoTokenizer

    from checkpoints_conversion import hf_to_megatron
    from checkpoints_conversion.hf_files import read_hf_config
    from checkpoints_conversion.stream import stream
    from megatron_nft.policy import parallel
    from megatron_nft.policy.packing import Sequence
    from megatron_nft.policy.step import Policy
    from megatron_nft.rollout.colocated import ColocatedEngine
    from megatron_nft.rollout.engine import Sampling

    options = RolloutConfig(max_response_tokens=12, max_sequences=32, temperature=0.7)
    config = Config(
        model=ModelConfig(path=str(path), dtype="float32"),
        parallel=ParallelConfig(tensor=tensor),
        rollout=options,
    )
    parallel.initialize(config.parallel, seed=0)
    hf_config = read_hf_config(path)
    fill = partial(hf_to_megatron.load, path=path, hf_config=hf_config)
    policy = Policy(config, hf_config, fill)
    tokenizer = AutoTokenizer.from_pretrained(path)
    engine = ColocatedEngine(path, tokenizer, options, "float32", max_tokens=64, seed=0)
    problems, found = _problems(), []
    for version in range(num_updates):
        with torch.no_grad():
            for parameter in policy.chunks[0].parameters():
                parameter.mul_(0.97 + 0.02 * version)
        engine.load_weights(stream(policy.chunks, policy.hf_config), version)
        answered = engine.generate(
            problems, [1.0] * len(problems), Sampling(4, 0.7, 1.0, 12, seed=version)
        )
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
        found.append({"delta": float(max(deltas)), "samples": samples})
    return found


@pytest.mark.processes
def test_engine_holds_the_policys_weights_after_every_update(tmp_path: Path) -> None:
    path = save_qwen2(tmp_path / "model", tied=True, hidden_size=128)  # vLLM: heads of 32
    save_tokenizer(path)
    together = run(_sample_after_updates, 2, path, 2, 3)[0]
    alone = run(_sample_after_updates, 1, path, 1, 3)[0]
    for ours, single in zip(together, alone, strict=True):
        assert ours["delta"] <= 1e-4
        assert single["delta"] <= 1e-4
        assert len(ours["samples"]) == 4 * NUM_PROBLEMS
        assert ours["samples"] == single["samples"]  # whatever the number of engines
    assert together[0]["samples"] != together[1]["samples"]
