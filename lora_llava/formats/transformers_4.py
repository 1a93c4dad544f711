"""Fields and files that transformers 4 reads, next to those that transformers 5 writes.

transformers 5 renamed settings without keeping the old names: a model that it saved does not load in transformers 4, or
loads with the default rotary base. Each value is written under both names; transformers 5 reads them as one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_llava.system.files import read_json

PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
TOKENIZER = "tokenizer_config.json"

_NEW_CLASS = "TokenizersBackend"
_PADDING = "LlavaImageProcessor"
_SESSION_KEYS = ("backend", "is_local", "local_files_only")
"""Keys in which transformers 5 records how a tokenizer was loaded. They are no settings."""


def with_old_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of config.json with `torch_dtype` next to `dtype`, and with the old names of rotary settings.

    Those are `rope_theta` and `rope_scaling`, next to `rope_parameters`, in every part of the model.
    """
    result = {
        # A stranger's config.json may hold anything under such a key.
        key: with_old_names(value) if key.endswith("_config") and isinstance(value, Mapping) else value
        for key, value in config.items()
    }
    if isinstance(dtype := config.get("dtype"), str):
        result["torch_dtype"] = dtype
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        result["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            result["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return result


def add_old_names(path: Path) -> None:
    """Rewrite a config.json with the old names of its settings."""
    _write(path, with_old_names(read_json(path)))


def add_old_files(directory: Path, *, is_model: bool) -> None:
    """Make the tokenizer and processor files of a directory readable for transformers 4.

    `is_model`: the directory holds config.json, which says what else transformers needs to know of the processor.
    """
    _rewrite_tokenizer(directory)
    _divide_processor(directory, is_model=is_model)


def _rewrite_tokenizer(directory: Path) -> None:
    """Name a tokenizer class, and special tokens, as transformers 4 and 5 both know them."""
    settings = read_json(directory / TOKENIZER)
    if not settings:
        return
    settings = {key: value for key, value in settings.items() if key not in _SESSION_KEYS}
    if settings.get("tokenizer_class", _NEW_CLASS) == _NEW_CLASS:
        sentencepiece = (directory / "tokenizer.model").is_file()
        settings["tokenizer_class"] = "LlamaTokenizer" if sentencepiece else "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        # transformers 4 has a mapping under this name, and fails on a list.
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    settings.setdefault("clean_up_tokenization_spaces", False)
    # The default of transformers 4 has token types, which no LLaVA takes.
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if "added_tokens_decoder" not in settings and (added := _added_tokens(directory)):
        settings["added_tokens_decoder"] = added
    _write(directory / TOKENIZER, dict(sorted(settings.items())))


def join_merges(path: Path) -> None:
    """Write the merges of a tokenizer.json as `a b`, the only form that tokenizers before 0.20 reads.

    A file with a space in a merged token keeps its pairs: in that form, it would not say where they divide.
    """
    data = read_json(path)
    merges = data["model"].get("merges") if data else None
    if merges and all(isinstance(pair, list) and " " not in "".join(pair) for pair in merges):
        data["model"]["merges"] = [" ".join(pair) for pair in merges]
        _write(path, data)


def _added_tokens(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the tokens outside the vocabulary of tokenizer.model, by id; the tokenizer without tokenizer.json."""
    tokens = read_json(directory / "tokenizer.json").get("added_tokens") or []
    return {str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in tokens}


def _divide_processor(directory: Path, *, is_model: bool) -> None:
    """Move the image settings of processor_config.json, where transformers 4 fails on them, to their own file.

    transformers 5 reads them there too.
    """
    processor = read_json(directory / PROCESSOR)
    images = processor.pop("image_processor", None)
    if not isinstance(images, dict):
        return
    if is_model and images.get("image_processor_type") == _PADDING:
        # Only transformers 4.49 and later have this class. Without a name, every version takes that of a LLaVA.
        images = {key: value for key, value in images.items() if key != "image_processor_type"}
    _write(directory / PREPROCESSOR, {"do_pad": False, **images})
    _write(directory / PROCESSOR, processor)


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
