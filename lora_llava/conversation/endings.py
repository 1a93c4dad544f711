"""End tokens of an answer: those of the base model, and the one that training teaches.

Contract: `chat`, `eval` and the merge probes stop at these tokens, and every exported model or adapter lists them in
its generation_config.json, so that `generate` of transformers stops there too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_llava.conversation.chat_template import OwnTemplate, own_end
from lora_llava.conversation.templates import Template, template_pieces, tokenize
from lora_llava.errors import ModelError
from lora_llava.system.files import read_json

_GENERATION_CONFIG = "generation_config.json"
_MAX_TOKENS = 2**31
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def end_token_ids(template: Template | OwnTemplate, tokenizer: Any, base_ends: Iterable[int]) -> list[int]:
    """Return the unique tokens that end an answer: `base_ends`, the tokenizer's end token, and the taught ones.

    `base_ends`: the end tokens in the model's generation_config.json. Raises ModelError if the template's end is not
    one token.
    """
    ends = [*base_ends, *(() if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),))]
    return list(dict.fromkeys([*ends, *taught_ends(template, tokenizer)]))


def taught_ends(template: Template | OwnTemplate, tokenizer: Any) -> list[int]:
    """Return the tokens that can be the last supervised token of an answer; for a model's own template at most one.

    If the end is ordinary text, such as a line feed, it may merge with the text before it into one token. Every token
    that ends with it then counts.
    """
    if isinstance(template, OwnTemplate):
        text = own_end(template)
        ids = tokenize(tokenizer, [text], trusted=True)[0] if text else []
        return ids[:1] if ids and ids[0] in tokenizer.added_tokens_decoder else []
    pieces = template_pieces(tokenizer, template)
    if pieces.end:
        return pieces.end[-1:]
    last = tokenize(tokenizer, [pieces.end_text], trusted=False)[0][-1]
    piece = tokenizer.convert_ids_to_tokens(last)
    joined = sorted(index for token, index in tokenizer.get_vocab().items() if token.endswith(piece) and index != last)
    return [*joined, last]


def stated_ends(directory: Path) -> list[int]:
    """Read the end tokens of a model or an artifact from generation_config.json, or else from config.json."""
    config = _generation_settings(directory)
    ends = config.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(type(end) is int and 0 <= end < _MAX_TOKENS for end in ends):
        raise ModelError(f"{directory}: eos_token_id is {ends!r:.80}, must be ids of tokens; download its files again")
    return list(ends)


def _generation_settings(directory: Path) -> dict[str, Any]:
    """Read the settings of `generate`: generation_config.json, completed from config.json."""
    config = read_json(directory / "config.json")
    text = config.get("text_config")
    text = text if isinstance(text, dict) else {}
    defaults = {key: config.get(key, text.get(key)) for key in _TOKENS}
    settings = read_json(directory / _GENERATION_CONFIG)
    return {key: value for key, value in defaults.items() if value is not None} | settings


def write_generation_config(
    directory: Path, base: Path, template: Template | OwnTemplate | None, tokenizer: Any
) -> list[int]:
    """Write the base's generation_config.json with all end tokens of an answer, and return them.

    `template`: the one used in training, or the model's own; None if unknown.
    """
    base_ends = stated_ends(base)
    ends = base_ends if template is None else end_token_ids(template, tokenizer, base_ends)
    settings = _generation_settings(base)
    if ends:
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    (directory / _GENERATION_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return ends
