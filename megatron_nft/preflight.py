"""What can be known to be wrong before anything expensive starts."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from checkpoints_conversion.hf_files import check_weights, read_hf_config
from megatron_nft import recipe
from megatron_nft.config import Config, Fp8Config, SourceConfig
from megatron_nft.policy.host import fp8_rollout_trouble, has_cuda
from megatron_nft.policy.layout import check_fp8, check_layout
from megatron_nft.problems import load_problems

# what may change between two starts of one run: when to look and when to stop, not what is learned
CHANGEABLE = (
    "run_dir",
    "rollouts",
    "evaluate.",
    "checkpoint.",
    "logging.",
    "verify.",
    "watchdog.",
    "memory.",
    "rollout.memory_fraction",
    "rollout.max_asks",
    "rollout.num_servers",
    "rollout.on_short_batch",
    "rollout.probe_tolerance",
    "rollout.servers",
    "rollout.start_timeout_s",
    "rollout.stall_timeout_s",
    "rollout.weight_transfer",
    "drift.warn",
    "drift.stop",
)

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


def check(config: Config, num_processes: int) -> None:
    """Look at everything that the recipe names.

    Raises:
        ValueError: a model, a layout, a data file or a run directory that cannot be used.
    """
    check_run_directory(config)
    check_transformer_engine(config)
    if config.rollout.weight_transfer == "nccl" and not has_cuda():
        raise ValueError("rollout.weight_transfer=nccl: this host has no GPU; set gloo or files")
    hf_config = check_engine(config, is_here=not config.rollout.servers)
    path = Path(config.model.path)
    check_layout(hf_config, config.parallel, num_processes)
    check_fp8(hf_config, config)
    check_engine_layout(config, hf_config, num_processes)
    with naming("model.path"):
        check_weights(path, hf_config)
    tokenizer = load_tokenizer(path)
    if len(tokenizer) > hf_config.vocab_size:
        raise ValueError(
            f"model.path: the tokenizer in {path} has {len(tokenizer)} tokens, but the model's "
            f"vocab_size is {hf_config.vocab_size}; they are of different models"
        )
    if config.logging.wandb_project and find_spec("wandb") is None:
        raise ValueError(
            f"logging.wandb_project is {config.logging.wandb_project!r}, but wandb is not "
            "installed: pip install wandb, or leave the key out"
        )
    for source in config.data.train:
        check_source(source, config, tokenizer)
    for source in config.evaluate.sets:
        load_problems(source, config.data, tokenizer)


def check_engine(config: Config, is_here: bool) -> PretrainedConfig:
    """What a vLLM server by itself needs of a recipe; the model's configuration.

    Args:
        is_here: it is to run on this host.
    """
    with naming("model.path"):
        hf_config = read_hf_config(Path(config.model.path))
    check_lengths(config, hf_config)
    trouble = fp8_rollout_trouble() if config.rollout.quantization == "fp8" else None
    if trouble and is_here:
        raise ValueError(f"rollout.quantization=fp8: {trouble}; set none, or run it elsewhere")
    return hf_config


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Say of which key a value is wrong."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def check_run_directory(config: Config) -> None:
    """Refuse to go on in a directory that another recipe began."""
    run_dir = Path(config.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"run_dir: {run_dir} is a file; give a directory, which may be new")
    saved = run_dir / "config.yaml"
    if not saved.is_file():
        return
    changed = [
        key
        for key in recipe.differences(recipe.load(saved), config)
        if not key.startswith(CHANGEABLE)
    ]
    if changed:
        raise ValueError(
            f"run_dir: {config.run_dir} belongs to a run with other values of {', '.join(changed)};"
            " give another run_dir, or the values that it was begun with"
        )


def check_transformer_engine(config: Config) -> None:
    """Refuse what only Transformer Engine computes, on a host that cannot run it."""
    wanted = {
        "model.layers=transformer_engine": config.model.layers == "transformer_engine",
        f"fp8.format={config.fp8.format}": config.fp8.format != "off",
    }
    lacking = "CUDA" if not has_cuda() else "the package transformer_engine"
    if has_cuda() and find_spec("transformer_engine") is not None:
        check_fp8_hardware(config.fp8)
        return
    for what, is_wanted in wanted.items():
        if is_wanted:
            raise ValueError(
                f"{what} needs a GPU and Transformer Engine, and this host lacks {lacking}; "
                "set model.layers=auto and fp8.format=off, or run it elsewhere"
            )


def check_fp8_hardware(fp8: Fp8Config) -> None:
    """Refuse recipes that this GPU or this CUDA version has no kernels for."""
    import torch

    if fp8.format == "off":
        return
    capability, cuda = torch.cuda.get_device_capability(), torch.version.cuda
    if fp8.recipe == "mxfp8" and capability < (10, 0):
        raise ValueError(
            f"fp8.recipe=mxfp8 needs a Blackwell GPU, and this one has compute capability "
            f"{capability[0]}.{capability[1]}; on Hopper set blockwise or tensorwise"
        )
    if fp8.recipe == "blockwise" and tuple(map(int, cuda.split(".")[:2])) < (12, 9):
        raise ValueError(
            f"fp8.recipe=blockwise needs CUDA 12.9, and torch has {cuda}; set tensorwise"
        )


def check_lengths(config: Config, hf_config: PretrainedConfig) -> None:
    """Prompt and response must fit into the positions that the model was made for."""
    if config.longest > hf_config.max_position_embeddings:
        raise ValueError(
            f"data.max_prompt_tokens + rollout.max_response_tokens = {config.longest}, but the "
            f"model has max_position_embeddings = {hf_config.max_position_embeddings}"
        )


def check_engine_layout(config: Config, hf_config: PretrainedConfig, num_processes: int) -> None:
    """The engines' ranks must divide the processes and the model's heads."""
    numbers = {"attention heads": hf_config.num_attention_heads}
    if config.rollout.engine == "colocated":
        numbers["processes"] = num_processes
    for what, number in numbers.items():
        if number % config.rollout.tensor:
            raise ValueError(
                f"rollout.tensor={config.rollout.tensor} does not divide the {number} {what}"
            )


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The model directory's tokenizer; ValueError where it has none that can be loaded."""
    if not any((path / name).is_file() for name in TOKENIZER_FILES):  # transformers would make one
        raise ValueError(
            f"model.path: {path} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}"
        )
    from transformers import AutoTokenizer  # seconds, of no use where the model is wrong

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # of no narrower type: tokenizers raises Exception itself
        raise ValueError(
            f"model.path: {path} has no tokenizer that loads: {type(error).__name__}: {error}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model.path: the tokenizer in {path} has no end-of-text token")
    return tokenizer


def check_source(source: SourceConfig, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Read a training file as the run will; solutions are needed for supervised fine-tuning."""
    problems = load_problems(source, config.data, tokenizer).problems
    without = sum(problem.solution_tokens is None for problem in problems)
    if config.objective.name == "sft" and without:
        raise ValueError(
            f"{source.path}: {without} of {len(problems)} rows have no worked solution, which "
            "objective.name=sft needs; name its column with `solution:`"
        )
    longest = max((len(p.solution_tokens) for p in problems if not without), default=0)
    if config.objective.name == "sft" and longest > config.rollout.max_response_tokens:
        raise ValueError(
            f"{source.path}: the longest worked solution has {longest} tokens, but "
            f"rollout.max_response_tokens is {config.rollout.max_response_tokens}"
        )
