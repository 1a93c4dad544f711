"""Read the configuration and tokenizer of a base, without its weights and without PyTorch."""

from __future__ import annotations

import copy
import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError
from transformers import AutoConfig, LlavaConfig

from lora_llava.conversation.encode import IMAGE_PLACEHOLDER
from lora_llava.errors import LoraLlavaError, ModelError
from lora_llava.formats.sizes import check_sizes
from lora_llava.formats.tokenizer import read_tokenizer
from lora_llava.modeling.structure import num_image_tokens
from lora_llava.recipe.fields import PACKAGED, is_local, packaged
from lora_llava.recipe.settings import PROJECTOR_ACTIVATIONS, BaseModelSettings
from lora_llava.system.files import read_json, refuse_irregular
from lora_llava.system.hub.failures import chain, gated
from lora_llava.system.hub.network import bounded
from lora_llava.system.text import first_line, listed

VOCABULARY_MULTIPLE = 64
"""The vocabulary is padded to a multiple of this, as in llava-hf's models (32,000 + `<image>` + `<pad>` -> 32,064)."""

_CUSTOM_CODE = re.compile("custom code|trust_remote_code")
"""In transformers' refusals of a model that brings code."""
_NO_CODE = (
    "it needs custom code (auto_map), and the kit runs no code that comes with a model. Name a model that "
    "transformers knows by itself."
)
_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
_WEIGHTS = "*.safetensors"


def describe_base(settings: BaseModelSettings) -> tuple[LlavaConfig, Any]:
    """Return the configuration and tokenizer of a base, existing or to be assembled; no weight is read.

    Local files need no network. Raises ModelError.
    """
    name = settings.model_name_or_path
    if name is None:
        return part_configs(settings)[:2]
    return describe_directory(locate(name, settings.revision, with_weights=False)[0])


def locate(name: str, revision: str | None, *, with_weights: bool = True) -> tuple[Path, str | None]:
    """Return the local directory of a base and the commit it came from (None for a directory).

    Raises ModelError if it is neither a directory nor available from the hub.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory, None
    if is_local(name):
        raise ModelError(f"base directory {name!r} does not exist")
    files = [*_SMALL_FILES, _WEIGHTS] if with_weights else _SMALL_FILES
    with hub_errors("base", name), bounded():
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=files))
    return snapshot, snapshot.name


def describe_directory(directory: Path) -> tuple[LlavaConfig, Any]:
    """Return the configuration and tokenizer of a LLaVA directory; ModelError if it is none."""
    config = read_config(directory)
    with hub_errors("base", str(directory)):
        refuse_irregular(directory, ModelError)
        tokenizer = read_tokenizer(directory)
    return config, tokenizer


def read_config(directory: Path) -> LlavaConfig:
    """Read the configuration of a LLaVA directory; ModelError if it is none."""
    data = read_json(directory / "config.json")
    if data.get("model_type") != "llava":
        raise ModelError(
            f"{directory}: model_type is {data.get('model_type')!r}, needed 'llava'. Name a converted LLaVA-1.5 "
            "(such as llava-hf/llava-1.5-7b-hf) in base.model_name_or_path, or the parts in base.language_model "
            "and base.vision_tower."
        )
    refuse_wrong_sizes(data, directory / "config.json")
    with hub_errors("base", str(directory)):
        config = LlavaConfig.from_dict(data)
    if config.text_config.model_type != "llama":
        raise ModelError(f"{directory}: the language model is {config.text_config.model_type!r}, needed 'llama'")
    return config


@contextmanager
def hub_errors(what: str, name: str) -> Iterator[None]:
    """Turn any error of the files of `name`, a library that reads them, the hub or the network into a ModelError."""
    try:
        yield
    except (LoraLlavaError, MemoryError):
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ModelError(f"{what} {name!r} cannot be loaded: {_explain(error, name)}") from error
    except Exception as error:  # what libraries raise for damaged files has no common base
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise ModelError(f"{what} {name!r} cannot be loaded: {_explain(error, name)}") from error


def _explain(error: Exception, name: str) -> str:
    """Return why a model cannot be loaded, and what to do."""
    if _CUSTOM_CODE.search(str(error)):
        return _NO_CODE
    if any(isinstance(cause, GatedRepoError) for cause in chain(error)):
        return gated(name)
    reason = first_line(error)
    if Path(name).expanduser().is_dir():
        return f"{reason}. One of its files is damaged or of another model; download it again."
    return f"{reason}. Check the name, or the network."


def part_configs(settings: BaseModelSettings) -> tuple[LlavaConfig, Any, Any]:
    """Return configuration and tokenizer that `assemble` would write, and the language model's own configuration.

    Reads no weight.
    """
    assert settings.language_model and settings.vision_tower
    with hub_errors("language model", settings.language_model), bounded():
        name, file = settings.language_model, settings.gguf_file
        tokenizer = read_tokenizer(name, gguf_file=file)
        text_config = read_any_config(name, gguf_file=file)
    with hub_errors("vision tower", settings.vision_tower), bounded():
        vision_config = read_any_config(vision_tower_source(settings.vision_tower))
    vision_config = getattr(vision_config, "vision_config", vision_config)
    return _assembled_config(settings, text_config, vision_config, tokenizer), tokenizer, text_config


def read_any_config(name: str, gguf_file: str | None = None) -> Any:
    """Return the configuration of a model of any architecture; ModelError if it asks for code that comes with it."""
    refuse_irregular(Path(name), ModelError)
    # What transformers takes of a damaged file could not be written again.
    read_json(Path(name) / "config.json")
    config = AutoConfig.from_pretrained(name, gguf_file=gguf_file, trust_remote_code=False)
    refuse_wrong_sizes(config.to_dict(), Path(name))
    if getattr(config, "auto_map", None):
        raise ModelError(f"{name}: {_NO_CODE}")
    return config


def image_statistics(processor: Mapping[str, Any], where: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of pixel values, of three channels each; ModelError if there are none."""
    if isinstance(processor.get("image_processor"), Mapping):
        processor = processor["image_processor"]
    mean, std = (processor.get(name) for name in ("image_mean", "image_std"))
    if not (_is_three(mean) and _is_three(std)):
        raise ModelError(f"{where}: image_mean and image_std must be 3 numbers each; download its files again")
    return tuple(mean), tuple(std)


def _is_three(values: Any) -> TypeGuard[Sequence[float]]:
    return isinstance(values, list | tuple) and len(values) == 3 and all(map(_is_number, values))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6


def refuse_wrong_sizes(config: Mapping[str, Any], where: Path) -> None:
    """Raise ModelError for a configuration whose sizes are no integers, or absurd."""
    if wrong := list(check_sizes(config)):
        raise ModelError(
            f"{where}: {listed(wrong, 3)}: needed is an integer, above 0 and of no absurd size. Download it again."
        )


def vision_tower_source(name: str) -> str:
    """Resolve `package:NAME` to the directory of a tower that ships with the package."""
    if not name.startswith(PACKAGED):
        return name
    directory = packaged(name)
    if not directory.is_dir():
        raise ModelError(f"base.vision_tower: the package has no tower {name!r}, only package:vision_tower")
    return str(directory)


def _assembled_config(settings: BaseModelSettings, text_config: Any, vision_config: Any, tokenizer: Any) -> LlavaConfig:
    """Return the configuration of a LLaVA with these parts; adds `<image>` to `tokenizer`."""
    if text_config.model_type != "llama":
        raise ModelError(
            f"base.language_model {settings.language_model!r} is a {text_config.model_type!r} model; needed: one of "
            "the Llama architecture (Llama 2, Vicuna, TinyLlama, SmolLM2, ...)"
        )
    if vision_config.model_type != "clip_vision_model":
        raise ModelError(f"base.vision_tower {settings.vision_tower!r} is not a CLIP vision tower")
    text_config = copy.deepcopy(text_config)
    if hasattr(text_config, "quantization_config"):
        del text_config.quantization_config
    # Keep local paths of the parts out of the published configuration.
    text_config._name_or_path = vision_config._name_or_path = ""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_PLACEHOLDER]})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    size = max(int(text_config.vocab_size), len(tokenizer))
    text_config.vocab_size = -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER),
        projector_hidden_act=PROJECTOR_ACTIVATIONS[settings.mm_projector_type],
        vision_feature_layer=settings.vision_feature_layer,
        vision_feature_select_strategy=settings.vision_feature_select_strategy,
        tie_word_embeddings=bool(text_config.tie_word_embeddings),
    )
    config.image_seq_length = num_image_tokens(config)
    return config
