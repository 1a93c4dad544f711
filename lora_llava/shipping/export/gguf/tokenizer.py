"""Convert a fast tokenizer to GGUF metadata: SentencePiece BPE with byte fallback, or byte-level BPE.

Everything is read from the tokenizer that training used, so that llama.cpp produces the same tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import Keys, TokenType

from lora_llava.conversation.chat_template import OwnTemplate, chat_template
from lora_llava.conversation.encode import IMAGE_PLACEHOLDER
from lora_llava.conversation.endings import end_token_ids, stated_ends
from lora_llava.conversation.templates import Template
from lora_llava.errors import ModelError
from lora_llava.formats.tokenizer import read_tokenizer
from lora_llava.shipping.export.gguf.file import Fields

MEDIA_MARKER = "<__media__>"
"""Placeholder of an image in a prompt for llama.cpp's mtmd."""

AnyTemplate = Template | OwnTemplate | None
"""The template to prompt a model with: one of the kit's, the model's own, or unknown."""

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
"""Pre-tokenizers by llama.cpp's name, and whether words that are in the vocabulary skip the merges.

Source: `llama-vocab.cpp` of llama.cpp. SmolLM2 is `smollm` as published, but transformers reads it from a GGUF file as
`gpt-2`; what counts is the tokenizer that training used.
"""


def tokenizer_fields(directory: Path, vocabulary: int, template: AnyTemplate) -> Fields:
    """Return the metadata of a model directory's tokenizer and chat template.

    `vocabulary`: rows of the embeddings; rows without a token get a name and are marked unused. Raises ModelError for
    a tokenizer that llama.cpp does not implement.
    """
    tokenizer: Any = read_tokenizer(directory)
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise ModelError(f"{directory}: a {model['type']} tokenizer; GGUF is written for BPE only")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    is_sentencepiece = bool(model["byte_fallback"])
    tokens = _tokens(directory, tokenizer, vocabulary)
    types = _types(tokenizer, tokens, is_sentencepiece)
    fields: Fields = {
        Keys.Tokenizer.MODEL: "llama" if is_sentencepiece else "gpt2",
        Keys.Tokenizer.PRE: "default" if is_sentencepiece else _pre_tokenizer_name(backend),
        Keys.Tokenizer.LIST: tokens,
        Keys.Tokenizer.TOKEN_TYPE: types,
        Keys.Tokenizer.ADD_PREFIX: is_sentencepiece and has_space_prefix(backend),
    }
    if is_sentencepiece:
        fields[Keys.Tokenizer.SCORES] = _scores(tokens, types, merges)
    else:
        fields[Keys.Tokenizer.MERGES] = [" ".join(pair) for pair in merges]
    fields |= _special_tokens(directory, tokenizer, template)
    if template is not None:
        fields[Keys.Tokenizer.CHAT_TEMPLATE] = _chat_template(template, tokenizer.eos_token)
    return fields


def _chat_template(template: Template | OwnTemplate, eos_token: str) -> str:
    """Return a template in Jinja, with llama.cpp's placeholder for images."""
    if isinstance(template, OwnTemplate):
        return template.jinja.replace(IMAGE_PLACEHOLDER, MEDIA_MARKER)
    return chat_template(template, eos_token, MEDIA_MARKER)


def _tokens(directory: Path, tokenizer: Any, vocabulary: int) -> list[str]:
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    if (highest := max(by_id)) >= vocabulary:
        raise ModelError(
            f"{directory}: the token {by_id[highest]!r} has id {highest}, but the embeddings have {vocabulary} rows"
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


def _scores(tokens: list[str], types: list[int], merges: list[list[str]]) -> list[float]:
    """Return the scores with which SentencePiece's algorithm applies the merges in their order.

    The earlier a merge produces a piece, the higher its score; pieces that no merge produces come last, as in Llama's
    own files.
    """
    rank: dict[str, int] = {}
    for pair in merges:
        rank.setdefault("".join(pair), len(rank))
    for token, kind in zip(tokens, types, strict=True):
        if kind == TokenType.NORMAL:
            rank.setdefault(token, len(rank))
    return [-float(rank.get(token, 0)) for token in tokens]


def _pre_tokenizer_name(backend: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a byte-level tokenizer; ModelError if it has none."""
    pre_tokenizer = backend["pre_tokenizer"] or {"type": "none"}
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    for name, (expected, whole_words) in _PRE_TOKENIZERS.items():
        fits = len(steps) == len(expected) and all(
            {key: step.get(key) for key in settings} == settings for step, settings in zip(steps, expected, strict=True)
        )
        if fits and backend["normalizer"] is None and bool(backend["model"].get("ignore_merges")) == whole_words:
            return name
    raise ModelError(
        f"the pre-tokenizer ({' and '.join(step['type'] for step in steps)}) is none of those known from llama.cpp "
        f"({', '.join(_PRE_TOKENIZERS)}); with another one it would produce other tokens. Export "
        "with --format hf, and convert that with llama.cpp's own convert_hf_to_gguf.py"
    )


def has_space_prefix(backend: Mapping[str, Any]) -> bool:
    """Tell whether a SentencePiece tokenizer puts a space before a text. Raises ModelError for other normalization."""
    pre_tokenizer, normalizer = backend["pre_tokenizer"], backend["normalizer"]
    if (
        normalizer is None
        and pre_tokenizer is not None
        and pre_tokenizer["type"] == "Metaspace"
        and not pre_tokenizer.get("split")
    ):
        return bool(pre_tokenizer["prepend_scheme"] != "never")
    steps = (normalizer or {}).get("normalizers", [])
    if pre_tokenizer is None and [step["type"] for step in steps] in (["Prepend", "Replace"], ["Replace"]):
        return len(steps) == 2
    raise ModelError(
        "the tokenizer has byte fallback, but treats spaces differently from Llama's, so llama.cpp would not agree"
    )


def _special_tokens(directory: Path, tokenizer: Any, template: AnyTemplate) -> Fields:
    ids = {
        Keys.Tokenizer.BOS_ID: tokenizer.bos_token_id,
        Keys.Tokenizer.EOS_ID: tokenizer.eos_token_id,
        Keys.Tokenizer.UNK_ID: tokenizer.unk_token_id,
        Keys.Tokenizer.PAD_ID: tokenizer.pad_token_id,
    }
    stated = stated_ends(directory)
    ends = stated if template is None else end_token_ids(template, tokenizer, stated)
    # The format has two more keys for tokens that end an answer. The trained one is last in `ends`, so it goes first.
    others = [token for token in reversed(ends) if token != tokenizer.eos_token_id]
    ids |= dict(zip((Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID), others, strict=False))
    example = tokenizer("a").input_ids
    fields = {key: int(index) for key, index in ids.items() if index is not None}
    fields[Keys.Tokenizer.ADD_BOS] = bool(example[0] == tokenizer.bos_token_id)
    fields[Keys.Tokenizer.ADD_EOS] = bool(example[-1] == tokenizer.eos_token_id)
    return fields
