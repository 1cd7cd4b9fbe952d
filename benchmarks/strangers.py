"""Models of Qwen2.5's shapes with random weights, whose answers end by chance.

After every token the end of text is about equally likely, so that lengths are geometric: the first
channel of all embeddings is a constant that no layer writes to, and the end's row of the head reads
that channel alone, by as much as the wanted mean length needs. Everything else is random.
"""

import json
import math
import random
from itertools import chain, islice, product
from pathlib import Path
from string import ascii_lowercase

import torch
from shapes import FIELDS, SHAPES
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

END, END_TEXT = 0, "<|endoftext|>"  # Qwen2's: transformers would add it anyway
NUM_CALIBRATING = 1024  # random tokens


def write_model(
    path: Path,
    shape: str,
    num_layers: int,
    mean_tokens: float | None,
    dtype: torch.dtype,
    seed: int = 0,
) -> Path:
    """A Hugging Face directory of a model and its tokenizer, made on the GPU where there is one.

    Args:
        mean_tokens: of answers; None: they end hardly ever.
    """
    sizes = dict(zip(FIELDS, SHAPES[shape], strict=True)) | {"num_hidden_layers": num_layers}
    config = Qwen2Config(
        **sizes | {"tie_word_embeddings": False},  # the end has a row of its own
        max_position_embeddings=32_768,
        eos_token_id=END,
        bos_token_id=None,
        pad_token_id=END,
        dtype=dtype,
    )
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device, torch.no_grad():
        torch.set_default_dtype(dtype)
        model = Qwen2ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        if mean_tokens:
            _let_it_end(model, mean_tokens)
    model.save_pretrained(path)
    _tokenizer(config.vocab_size).save_pretrained(path)
    return path


def _let_it_end(model: Qwen2ForCausalLM, mean_tokens: float) -> None:
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    hidden_size, vocab_size = embedding.shape[1], len(head)
    embedding[:, 0] = math.sqrt(hidden_size)  # as much as all other channels after a few layers
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    head[:, 0] = 0
    head[END] = 0
    tokens = torch.randint(vocab_size, (1, NUM_CALIBRATING), device=head.device)
    states = model.model(tokens).last_hidden_state[0].float()
    others = (states @ head.float().t()).logsumexp(-1)
    head[END, 0] = ((others - math.log(mean_tokens)).mean() / states[:, 0].mean()).to(head.dtype)


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A token a letter, as questions have them, and words that nothing is split into."""
    words = map("".join, product(ascii_lowercase, repeat=4))
    tokens = islice(chain((END_TEXT,), ascii_lowercase, words), vocab_size)
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.add_special_tokens([END_TEXT])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TEXT,
        pad_token=END_TEXT,
        clean_up_tokenization_spaces=False,
    )


def write_questions(path: Path, number: int, num_tokens: int) -> Path:
    """So many random questions as JSON lines; the rule that judges answers looks at no gold."""
    draw = random.Random(0)
    rows = (
        {"question": "".join(draw.choices(ascii_lowercase, k=num_tokens)), "answer": "any"}
        for _ in range(number)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
