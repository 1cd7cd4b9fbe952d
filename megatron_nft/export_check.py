"""Does the exported directory hold the policy? transformers' log-probabilities against ours."""

from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_nft.policy.packing import Sequence
from megatron_nft.policy.step import Policy
from megatron_nft.rollout.groups import Problem

NUM_PROBES, PROBE_TOKENS = 8, 32
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # of a log-probability; bfloat16 has 8 bits


def check_export(policy: Policy, directory: Path, problems: Seq[Problem]) -> float:
    """The largest |Δlogp| over some prompts followed by random tokens; collective.

    Raises:
        RuntimeError: it is larger than rounding can explain.
    """
    sequences = _probes(problems, policy.hf_config.vocab_size)
    ours = policy.logp(sequences)
    largest = torch.zeros(1, dtype=torch.float64)
    if dist.get_rank() == 0:
        theirs = _transformers_logp(directory, sequences, policy.config.rollout.temperature)
        largest[0] = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
    dist.broadcast(largest, src=0)
    allowed = TOLERANCE[policy.config.model.dtype]
    if not largest.item() <= allowed:
        raise RuntimeError(
            f"{directory}: transformers' log-probabilities differ from the policy's by "
            f"{largest.item():.2e}, more than {allowed:.0e}: the export is not the policy"
        )
    return largest.item()


def _probes(problems: Seq[Problem], vocab_size: int) -> list[Sequence]:
    rng = np.random.default_rng(0)
    return [
        Sequence(
            prompt=problem.prompt_tokens,
            response=rng.integers(0, vocab_size, PROBE_TOKENS).astype(np.int32),
            logp=np.zeros(PROBE_TOKENS, np.float32),
            old_logp=np.zeros(PROBE_TOKENS, np.float32),
            correct=True,
            group_accuracy=0.5,
        )
        for problem in problems[:NUM_PROBES]
    ]


@torch.no_grad()
def _transformers_logp(
    directory: Path, sequences: Seq[Sequence], temperature: float
) -> list[np.ndarray]:
    from transformers import AutoModelForCausalLM  # several seconds, for this check alone

    model = AutoModelForCausalLM.from_pretrained(directory)
    found = []
    for s in sequences:
        tokens = torch.from_numpy(np.concatenate((s.prompt, s.response)).astype(np.int64))
        logits = model(tokens[None]).logits[0, len(s.prompt) - 1 : -1].float() / temperature
        targets = tokens[len(s.prompt) :, None]
        found.append(logits.log_softmax(-1).gather(1, targets)[:, 0].numpy())
    return found
