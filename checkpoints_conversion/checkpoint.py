"""A directory that may be either side's, with its tensors under their Hugging Face names."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from checkpoints_conversion.convert import hf_files_of
from checkpoints_conversion.hf_files import HFWeights, read_hf_config
from checkpoints_conversion.megatron_files import COMPLETE, METADATA, MegatronFiles
from checkpoints_conversion.source import Source
from checkpoints_conversion.views import as_hf


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Args:
        hf: the directory with its configuration and tokenizer; its own, or one in it.
        tensors: by Hugging Face name.
    """

    path: Path
    is_megatron: bool
    hf: Path
    hf_config: PretrainedConfig
    tensors: Source


def is_megatron(path: Path) -> bool:
    """Whether a directory holds a Megatron checkpoint, and not a Hugging Face one.

    Raises:
        ValueError: it looks like neither.
    """
    if (path / METADATA).is_file():
        return True
    if (path / "config.json").is_file():
        return False
    if (path / COMPLETE).is_file():
        return True
    raise ValueError(
        f"{path} is no checkpoint: neither config.json (Hugging Face) nor {METADATA} (Megatron)"
    )


def open_checkpoint(path: Path, hf: Path | None = None) -> Checkpoint:
    """Open either kind.

    Args:
        hf: configuration and tokenizer of a Megatron checkpoint that has none itself.

    Raises:
        ValueError: it is none, incomplete, damaged, or of an unsupported family.
    """
    if not is_megatron(path):
        hf_config = read_hf_config(path)
        return Checkpoint(path, False, path, hf_config, HFWeights(path, hf_config))
    hf = hf_files_of(path, hf)
    hf_config = read_hf_config(hf)
    files = MegatronFiles(path, hf_config)
    files.check()
    return Checkpoint(path, True, hf, hf_config, as_hf(files, hf_config))
