"""A fast tokenizer of transformers in GGUF's metadata: SentencePiece's BPE with byte fallback, or byte-level BPE.

All of it is read off the tokenizer that training used, so that llama.cpp makes the same tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import TokenType
from transformers import AutoTokenizer

from lora_llava.conversation.chat_template import OwnTemplate, chat_template
from lora_llava.conversation.encode import IMAGE_PLACEHOLDER, Template
from lora_llava.conversation.endings import end_token_ids, stated_ends
from lora_llava.errors import ModelError
from lora_llava.shipping.export.gguf.file import Fields, boolean, integer, integers, reals, string, strings

MEDIA_MARKER = "<__media__>"
"""What stands for an image in the text that llama.cpp's mtmd is given."""

AnyTemplate = Template | OwnTemplate | None
"""How a model is asked: a template of the kit, the model's own, or unknown."""

_PREFIX = "tokenizer.ggml."
_BYTE = re.compile(r"^<0x[0-9A-F]{2}>$")
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_PRE_TOKENIZERS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([_BYTE_LEVEL], False),
    "smollm": ([_DIGITS, _BYTE_LEVEL], False),
    "llama-bpe": (
        [
            {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False},
            {**_BYTE_LEVEL, "use_regex": False},
        ],
        True,
    ),
}
"""How text is cut before BPE, by llama.cpp's name for it, and whether whole words of the vocabulary skip the merges.

Source: `llama-vocab.cpp` of llama.cpp. SmolLM2 is `smollm` as published; read from a GGUF file transformers makes it
`gpt-2`, and whoever trained with that has that.
"""


def tokenizer_fields(directory: Path, vocabulary: int, template: AnyTemplate) -> Fields:
    """Write the tokenizer of a model directory, and the chat template, as metadata.

    `vocabulary` is the number of rows of the embeddings; those without a token are named and marked unused. Raises
    ModelError for a tokenizer that llama.cpp has no equal of.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise ModelError(f"{directory}: a {model['type']} tokenizer; GGUF is written for BPE alone")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    is_sentencepiece = bool(model["byte_fallback"])
    tokens = _tokens(directory, tokenizer, vocabulary)
    types = _types(tokenizer, tokens, is_sentencepiece)
    fields: Fields = {
        f"{_PREFIX}model": string("llama" if is_sentencepiece else "gpt2"),
        f"{_PREFIX}pre": string("default" if is_sentencepiece else pre_tokenizer_name(backend)),
        f"{_PREFIX}tokens": strings(tokens),
        f"{_PREFIX}token_type": integers(types),
        f"{_PREFIX}add_space_prefix": boolean(is_sentencepiece and has_space_prefix(backend)),
    }
    if is_sentencepiece:
        fields[f"{_PREFIX}scores"] = reals(scores(tokens, types, merges))
    else:
        fields[f"{_PREFIX}merges"] = strings([" ".join(pair) for pair in merges])
    fields |= _special_tokens(directory, tokenizer, template)
    if template is not None:
        fields["tokenizer.chat_template"] = string(_jinja(template, tokenizer.eos_token))
    return fields


def _jinja(template: Template | OwnTemplate, eos_token: str) -> str:
    """Write a template in Jinja with llama.cpp's word for an image."""
    if isinstance(template, OwnTemplate):
        return template.jinja.replace(IMAGE_PLACEHOLDER, MEDIA_MARKER)
    return chat_template(template, eos_token, MEDIA_MARKER)


def _tokens(directory: Path, tokenizer: Any, vocabulary: int) -> list[str]:
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    if (highest := max(by_id)) >= vocabulary:
        raise ModelError(
            f"{directory}: the token {by_id[highest]!r} has id {highest}, the embeddings {vocabulary} rows"
        )
    return [by_id.get(index, f"[PAD{index}]") for index in range(vocabulary)]


def _types(tokenizer: Any, tokens: list[str], is_sentencepiece: bool) -> list[int]:
    added = tokenizer.added_tokens_decoder
    known = tokenizer.get_vocab()

    def kind(index: int, token: str) -> TokenType:
        if token not in known:
            return TokenType.UNUSED
        if is_sentencepiece and index == tokenizer.unk_token_id:
            return TokenType.UNKNOWN
        if index in added:
            return TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
        return TokenType.BYTE if is_sentencepiece and _BYTE.match(token) else TokenType.NORMAL

    return [int(kind(index, token)) for index, token in enumerate(tokens)]


def scores(tokens: list[str], types: list[int], merges: list[list[str]]) -> list[float]:
    """Return the scores from which SentencePiece's algorithm makes the merges in this order.

    A piece is the better the earlier a merge makes it; those that no merge makes come after, as in Llama's own files.
    """
    order: dict[str, int] = {}
    for pair in merges:
        order.setdefault("".join(pair), len(order))
    for token, kind in zip(tokens, types, strict=True):
        if kind == TokenType.NORMAL:
            order.setdefault(token, len(order))
    return [-float(order.get(token, 0)) for token in tokens]


def pre_tokenizer_name(backend: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer cuts text before BPE. Raises ModelError."""
    cutter = backend["pre_tokenizer"] or {"type": "none"}
    steps = cutter["pretokenizers"] if cutter["type"] == "Sequence" else [cutter]
    for name, (wanted, whole_words) in _PRE_TOKENIZERS.items():
        fits = len(steps) == len(wanted) and all(
            {key: step.get(key) for key in one} == one for step, one in zip(steps, wanted, strict=True)
        )
        if fits and backend["normalizer"] is None and bool(backend["model"].get("ignore_merges")) == whole_words:
            return name
    raise ModelError(
        f"the tokenizer cuts text by {' and '.join(step['type'] for step in steps)}, in a way that is none of those "
        f"known from llama.cpp ({', '.join(_PRE_TOKENIZERS)}); with a wrong one it would make other tokens. Export "
        "with --format hf, and convert that with llama.cpp's own convert_hf_to_gguf.py"
    )


def has_space_prefix(backend: Mapping[str, Any]) -> bool:
    """Tell whether a SentencePiece tokenizer puts a space before a text. Raises ModelError for other changes to it."""
    cutter, normalizer = backend["pre_tokenizer"], backend["normalizer"]
    if normalizer is None and cutter is not None and cutter["type"] == "Metaspace" and not cutter.get("split"):
        return bool(cutter["prepend_scheme"] != "never")
    steps = (normalizer or {}).get("normalizers", [])
    if cutter is None and [step["type"] for step in steps] in (["Prepend", "Replace"], ["Replace"]):
        return len(steps) == 2
    raise ModelError(
        "the tokenizer has byte fallback, but treats spaces otherwise than Llama's; llama.cpp would make other tokens"
    )


def _special_tokens(directory: Path, tokenizer: Any, template: AnyTemplate) -> Fields:
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unknown": tokenizer.unk_token_id}
    ids["padding"] = tokenizer.pad_token_id
    own = stated_ends(directory)
    ends = own if template is None else end_token_ids(template, tokenizer, own)
    # The format has two more keys that end an answer; what was taught is the last, and must be among them.
    others = [one for one in reversed(ends) if one != tokenizer.eos_token_id]
    ids |= dict(zip(("eot", "eom"), others, strict=False))
    around = tokenizer("a").input_ids
    fields = {f"{_PREFIX}{name}_token_id": integer(index) for name, index in ids.items() if index is not None}
    fields[f"{_PREFIX}add_bos_token"] = boolean(around[0] == tokenizer.bos_token_id)
    fields[f"{_PREFIX}add_eos_token"] = boolean(around[-1] == tokenizer.eos_token_id)
    return fields
