r"""The demo's task: sums of two numbers, worked column by column, for a model of half a million.

    347+285=   ->   7+5=12,4+8+1=13,3+2+1=6,\boxed{632}

Both operands have the same number of digits, 2 to 4. Columns are worked from the right; a third
summand is the carry.

The cold start imitates a pupil who knows how but is careless: in `demonstrations.jsonl` any column
may be off by one, and the work goes on from there. The model learns to slip as often, at random:
longer sums fail more, most groups of answers are mixed, and NFT has to outdo its teacher.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

NUM_DIGITS = (2, 3, 4)
SLIP_RATE = 0.15  # of the columns in the demonstrations
MAX_PROMPT_TOKENS = 10  # 1234+5678=
MAX_RESPONSE_TOKENS = 42  # four columns with carries, the box, the end of text

PAD, END = "<pad>", "<|endoftext|>"  # Qwen2's END: transformers would add it anyway
BOX = "\\boxed{"
CHARACTERS = "{}0123456789+-*/=<>()[],.:;?!"
VOCABULARY = (PAD, END, BOX, *CHARACTERS)


def work_out(a: int, b: int, slips: Callable[[], int] = lambda: 0) -> str:
    """The worked solution of a+b, both of the same number of digits.

    `slips` says for each column by how much it is wrong; the carry and the answer follow from that.
    """
    carry, steps, digits = 0, [], ""
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        column = abs(int(x) + int(y) + carry + slips())
        steps.append(f"{x}+{y}{f'+{carry}' if carry else ''}={column}")
        carry, digits = column // 10, f"{column % 10}{digits}"
    return f"{','.join(steps)},{BOX}{int(f'{carry}{digits}')}}}"


def write_problems(
    directory: Path, seed: int, num_train: int = 9_000, num_heldout: int = 128
) -> None:
    """Writes train.jsonl, demonstrations.jsonl and heldout.jsonl; the seed alone decides on them.

    Train and held-out share no problem, whatever the order of operands; their solutions are right.
    The demonstrations are the train problems, answers right, solutions as the pupil worked them.
    The sizes take turns, as long as there are new problems of a size.
    """
    rng = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    rows = [_row(a, b) for a, b in _distinct_sums(rng, num_heldout + num_train)]
    heldout, train = rows[:num_heldout], rows[num_heldout:]
    files = {
        "heldout": heldout,
        "train": train,
        "demonstrations": [_careless(rng, r) for r in train],
    }
    for name, lines in files.items():
        text = "".join(json.dumps(row) + "\n" for row in lines)
        (directory / f"{name}.jsonl").write_text(text)


def _distinct_sums(rng: random.Random, count: int) -> list[tuple[int, int]]:
    """Pairs of operands, in random order, none in both orders."""
    sums: dict[frozenset[int], tuple[int, int]] = {}
    while len(sums) < count:
        for digits in NUM_DIGITS:
            low, high = 10 ** (digits - 1), 10**digits - 1
            a, b = rng.randint(low, high), rng.randint(low, high)
            sums.setdefault(frozenset((a, b)), (a, b))
    pairs = list(sums.values())[:count]
    rng.shuffle(pairs)
    return pairs


def _row(a: int, b: int) -> dict[str, str]:
    return {"question": f"{a}+{b}=", "answer": str(a + b), "solution": work_out(a, b)}


def _careless(rng: random.Random, row: dict[str, str]) -> dict[str, str]:
    def slips() -> int:
        return rng.choice((-1, 1)) if rng.random() < SLIP_RATE else 0

    a, b = row["question"].removesuffix("=").split("+")
    return row | {"solution": work_out(int(a), int(b), slips)}


def make_tokenizer() -> PreTrainedTokenizerFast:
    r"""One token a character, and one for `\boxed{`."""
    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([PAD, END])
    tokenizer.add_tokens([AddedToken(BOX, normalized=False)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def make_model(directory: Path, seed: int) -> None:
    """Writes a random Qwen2 of 0.5M parameters in float32, with its tokenizer.

    The initial weights are wider than the usual 0.02: a model this narrow learns several times as
    fast from them.
    """
    tokenizer = make_tokenizer()
    ends = {"bos_token_id": None, "eos_token_id": VOCABULARY.index(END), "pad_token_id": 0}
    config = Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.05,
        dtype=torch.float32,
        **ends,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, **ends)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
