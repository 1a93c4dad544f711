"""Where an answer ends: the base's own end tokens, and the one that training teaches.

Contract: `chat`, `eval` and the probes stop at these tokens, and every model or adapter that leaves the kit names
them in its generation_config.json, so that plain `generate` stops there too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_llava.conversation.chat_template import OwnTemplate, own_end, read_json
from lora_llava.conversation.templates import Template, template_pieces, tokenise

GENERATION_CONFIG = "generation_config.json"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def end_token_ids(template: Template | OwnTemplate, tokenizer: Any, own: Iterable[int]) -> list[int]:
    """Return the tokens that end an answer, each once: those in `own`, the tokenizer's end, and what is taught.

    `own` are the ends that the model's generation_config.json names. Raises ModelError if the tokenizer cannot write
    the template's end as one token.
    """
    ends = [*own, *(() if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),))]
    return list(dict.fromkeys([*ends, *taught_ends(template, tokenizer)]))


def taught_ends(template: Template | OwnTemplate, tokenizer: Any) -> list[int]:
    """Return the tokens that can be the last supervised one of an answer; of a model's own template at most one.

    Where the end is plain text, such as a line feed, it may be joined with what stands before it: then every token
    that ends with it is an end.
    """
    if isinstance(template, OwnTemplate):
        text = own_end(template)
        ids = tokenise(tokenizer, [text], trusted=True)[0] if text else []
        return ids[:1] if ids and ids[0] in tokenizer.added_tokens_decoder else []
    pieces = template_pieces(tokenizer, template)
    if pieces.end:
        return pieces.end[-1:]
    last = tokenise(tokenizer, [pieces.end_text], trusted=False)[0][-1]
    piece = tokenizer.convert_ids_to_tokens(last)
    joined = sorted(index for token, index in tokenizer.get_vocab().items() if token.endswith(piece) and index != last)
    return [*joined, last]


def stated_ends(directory: Path) -> list[int]:
    """Read the end tokens that a model or an artifact names: in generation_config.json, or else in config.json."""
    config = generation_settings(directory)
    ends = config.get("eos_token_id")
    return [] if ends is None else [int(one) for one in (ends if isinstance(ends, list) else [ends])]


def generation_settings(directory: Path) -> dict[str, Any]:
    """Read what plain `generate` goes by: generation_config.json, and from config.json what it leaves out."""
    config = read_json(directory / "config.json")
    text = config.get("text_config") or {}
    found = {key: config.get(key, text.get(key)) for key in _TOKENS}
    own = read_json(directory / GENERATION_CONFIG)
    return {key: value for key, value in found.items() if value is not None} | own


def write_generation_config(
    directory: Path, base: Path, template: Template | OwnTemplate | None, tokenizer: Any
) -> list[int]:
    """Write the base's generation_config.json with all ends of an answer; returns them.

    `template` is that of the training, or the model's own; None where it is not known.
    """
    own = stated_ends(base)
    ends = own if template is None else end_token_ids(template, tokenizer, own)
    settings = generation_settings(base)
    if ends:
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    (directory / GENERATION_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return ends
