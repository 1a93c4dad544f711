"""What a base is, without its weights: configuration and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, LlavaConfig

from lora_llava.errors import ModelError
from lora_llava.modeling.assemble import part_configs
from lora_llava.modeling.base import hub_errors, read_config
from lora_llava.recipe import BaseModelSettings

_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]


def describe_base(settings: BaseModelSettings) -> tuple[LlavaConfig, Any]:
    """Return the configuration and tokenizer of a base, found or to be assembled; no weight is read.

    For local files no network is touched. Raises ModelError; `is_missing` tells whether the base is not to be
    had here, or is not fit.
    """
    name = settings.model_name_or_path
    if name is None:
        return part_configs(settings)
    directory = Path(name).expanduser()
    if not directory.is_dir():
        with hub_errors("base", name):
            if directory.is_absolute():
                raise FileNotFoundError("there is no such directory")
            directory = Path(snapshot_download(name, revision=settings.revision, allow_patterns=_SMALL_FILES))
    return describe_directory(directory)


def describe_directory(directory: Path) -> tuple[LlavaConfig, Any]:
    """Return the configuration and tokenizer of a LLaVA directory; ModelError if it holds something else."""
    config = read_config(directory)
    with hub_errors("base", str(directory)):
        tokenizer = AutoTokenizer.from_pretrained(directory)
    return config, tokenizer


def is_missing(error: ModelError) -> bool:
    """Tell a base that could not be had, from one that was read and cannot be used."""
    return isinstance(error.__cause__, OSError)
