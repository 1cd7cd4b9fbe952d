"""Models that answer at once as a benchmark wants it: of known lengths, right half of the time.

A pupil goes on after the demo's sums with `FILLER`, from its start or from anywhere in it, puts one
of two digits in the box, and ends. Seconds of imitation teach it that, in this process. `grow`
makes a larger model out of it that gives the same probabilities, so that two sizes can be compared
on the same answers.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from megatron_nft.arithmetic import BOX, END, write_problems

FILLER = "0123456789-*/<>()[].:;?!"
RIGHT, WRONG = "1", "0"
ANSWER_TOKENS = len(FILLER) + 4  # the box, a digit, its brace and the end of text
NUM_PROBLEMS, BATCH = 6_000, 64


def write_questions(path: Path, seed: int) -> list[str]:
    """The demo's sums as a JSON-lines file, all with the answer `RIGHT`; the questions."""
    write_problems(path.parent / "demo", seed, num_train=NUM_PROBLEMS, num_heldout=0)
    lines = (path.parent / "demo" / "train.jsonl").read_text().splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    rows = [{"question": question, "answer": RIGHT} for question in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return questions


def teach(
    directory: Path, questions: Sequence[str], seed: int, num_steps: int, is_varied: bool
) -> None:
    """Let the model in the directory imitate such answers, in place.

    Where lengths are varied, they are all equally likely, from 4 tokens to `ANSWER_TOKENS`.
    """
    rng = random.Random(seed)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(num_steps):
        lr = 3e-3 * min(1.0, (step + 1) / 10, 2 * (1 - step / num_steps))
        optimizer.param_groups[0]["lr"] = lr
        answers = [_answer(rng, is_varied) for _ in range(BATCH)]
        asked = rng.sample(questions, BATCH)
        ids, labels = _rows(
            [[tokenizer.encode(t) for t in pair] for pair in zip(asked, answers, strict=True)]
        )
        logits = model(input_ids=ids).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)


def _answer(rng: random.Random, is_varied: bool) -> str:
    start = rng.randint(0, len(FILLER)) if is_varied else 0
    return f"{FILLER[start:]}{BOX}{rng.choice(RIGHT + WRONG)}}}{END}"


def _rows(pairs: Sequence[Sequence[list[int]]]) -> tuple[Tensor, Tensor]:
    """Questions and answers, padded on the right; the answers as labels, −100 elsewhere."""
    ids = torch.zeros(len(pairs), max(len(q) + len(a) for q, a in pairs), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, (question, answer) in enumerate(pairs):
        end = len(question) + len(answer)
        ids[i, :end] = torch.tensor(question + answer)
        labels[i, len(question) : end] = torch.tensor(answer)
    return ids, labels


def grow(source: Path, out: Path, hidden_size: int, intermediate_size: int, layers: int) -> None:
    """Write a larger Qwen2 that computes what the source does.

    Heads keep their size. New channels of the residual stream stay zero, as nothing writes to them;
    what reads them, and all that new layers compute before their last product, is random.
    """
    small = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config: Qwen2Config = small.config
    factor = hidden_size // config.hidden_size
    wide = Qwen2Config(
        **config.to_dict()
        | {
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": layers,
            "layer_types": ["full_attention"] * layers,
            "num_attention_heads": factor * config.num_attention_heads,
            "num_key_value_heads": factor * config.num_key_value_heads,
            "rms_norm_eps": config.rms_norm_eps / factor,
        }
    )
    large = Qwen2ForCausalLM(wide)
    weights = small.state_dict()
    with torch.no_grad():
        for name, new in large.named_parameters():
            _grow_one(name, new, weights.get(name), factor)
    large.generation_config = small.generation_config
    large.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


def _grow_one(name: str, new: Tensor, old: Tensor | None, factor: int) -> None:
    """The old numbers in the first rows and columns; zero where they would reach the old result."""
    writes = "o_proj" in name or "down_proj" in name or "embed_tokens" in name
    if writes:
        new.zero_()
    if old is None:
        return
    if "norm" in name:  # the mean square of so many more channels is so much smaller
        old = old / factor**0.5
    new[tuple(slice(size) for size in old.shape)] = old
