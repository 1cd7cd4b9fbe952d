"""What a checkpoint's model makes of a text: transformers' or Megatron-Core's own computation."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoints_conversion.checkpoint import Checkpoint

ALONE = {  # torchrun's environment of a job of one process
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


@dataclass(frozen=True)
class OutputDifference:
    """Between two models' logits on one text."""

    num_tokens: int
    largest_logit: float  # |Δ|, after taking each token's mean off, which no softmax sees
    largest_logp: float  # |Δ| of the text's own tokens
    same_choice: float  # fraction of tokens with the same most probable successor

    def line(self) -> str:
        return (
            f"outputs on {self.num_tokens} tokens: largest |Δlogit| {self.largest_logit:.3g}, "
            f"largest |Δlogp| {self.largest_logp:.3g}, same most probable token "
            f"{self.same_choice:.1%}"
        )


def compare_outputs(a: Checkpoint, b: Checkpoint, text: str) -> OutputDifference:
    """Run both models in float32 on a text, tokenized by A's tokenizer.

    Raises:
        ValueError: no tokenizer, a text of fewer than two tokens, or vocabularies that differ.
    """
    if a.hf_config.vocab_size != b.hf_config.vocab_size:
        raise ValueError(
            f"--logits: A has {a.hf_config.vocab_size} tokens, B {b.hf_config.vocab_size}"
        )
    tokens = _tokens(a, text)
    ours, theirs = logits(a, tokens), logits(b, tokens)
    delta = (ours - ours.mean(-1, True)) - (theirs - theirs.mean(-1, True))
    targets = tokens[1:, None]
    logp = [x[:-1].log_softmax(-1).gather(1, targets) for x in (ours, theirs)]
    return OutputDifference(
        len(tokens),
        float(delta.abs().max()),
        float((logp[0] - logp[1]).abs().max()),
        float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    )


@torch.no_grad()
def logits(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    """float32 [T, V] for int64 [T]: a Megatron checkpoint's by Megatron-Core itself."""
    if checkpoint.is_megatron:
        return _megatron_logits(checkpoint, tokens)
    from transformers import AutoModelForCausalLM  # seconds, for this alone

    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    return model(tokens[None]).logits[0]


def _tokens(checkpoint: Checkpoint, text: str) -> Tensor:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.hf)
    except (ValueError, OSError) as error:
        raise ValueError(f"--logits: {checkpoint.hf} has no tokenizer that loads") from error
    tokens = torch.tensor(tokenizer(text).input_ids[: checkpoint.hf_config.max_position_embeddings])
    if len(tokens) < 2:
        raise ValueError(f"--logits: {text!r} is of {len(tokens)} tokens; give a longer text")
    return tokens.long()


def _megatron_logits(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    """Megatron's own loader and model in this one process; torch's groups begin and end here."""
    from megatron_nft.config import Config, ModelConfig
    from megatron_nft.policy import host, parallel
    from megatron_nft.policy.architecture import build_model, transformer_config
    from megatron_nft.policy.packed_row import pack_row

    config = Config(model=ModelConfig(dtype="float32", layers="torch"))
    os.environ |= ALONE
    parallel.initialize(config.parallel, seed=0)
    try:
        hf_config = checkpoint.hf_config
        [model] = build_model(hf_config, transformer_config(hf_config, config))
        _load(model, checkpoint)
        row = pack_row((len(tokens),), host.device())
        tokens = tokens[None].to(host.device())
        found = model.eval()(tokens, row.positions[None], None, packed_seq_params=row)
        return found[0, :, : hf_config.vocab_size].float().cpu()
    finally:
        parallel.finalize()


def _load(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    from megatron.core import dist_checkpointing

    for parameter in model.parameters():
        parameter.zero_()
    loaded = dist_checkpointing.load(model.sharded_state_dict(), str(checkpoint.path))
    model.load_state_dict(loaded)
