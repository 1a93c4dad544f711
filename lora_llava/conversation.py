"""From turns to `input_ids` and `labels`, made together, piece by piece.

Contract: for `vicuna_v1` and `plain` both equal what the original LLaVA-1.5 preprocessing gives. A prompt is cut
at the image; what stands before it and what stands after it are tokenised apart, so every conversation about an
image starts with the same tokens, and the ids of a prompt are a prefix of the ids of the answered prompt.

Text of a record never becomes a special token: only the template's own markers are parsed as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol

from lora_llava.errors import DataError, ModelError
from lora_llava.templates import TEMPLATES, Template, get_template

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_PLACEHOLDER",
    "TEMPLATES",
    "Encoded",
    "Template",
    "Tokenizer",
    "Turn",
    "encode",
    "encode_prompt",
    "get_template",
]

IGNORE_INDEX = -100
"""Label of a token that is no target of the loss."""
IMAGE_PLACEHOLDER = "<image>"


class Tokenizer(Protocol):
    """What is needed of a tokenizer: a fast one of transformers."""

    def __call__(
        self,
        text: list[str],
        *,
        add_special_tokens: bool,
        split_special_tokens: bool,
        return_attention_mask: bool,
    ) -> Any:
        """Tokenise texts; `["input_ids"]` of the result holds a list of ids for each."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message; the text of one user turn may hold one `<image>`."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as ids; `labels` has the length of `input_ids`, IGNORE_INDEX where nothing is learned."""

    input_ids: list[int]
    labels: list[int]
    prefix_length: int
    """Tokens up to the end of an image in the first turn, which all conversations about it share; else 0."""

    @property
    def num_supervised(self) -> int:
        """Tokens that are targets of the loss."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)


def encode(
    turns: Sequence[Turn],
    template: Template,
    tokenizer: Tokenizer,
    *,
    image_token_id: int,
    num_image_tokens: int,
    max_length: int,
    where: str,
) -> Encoded:
    """Encode an answered conversation; what exceeds `max_length` tokens is cut off at the end, here only.

    Raises DataError naming `where` (file, record) for turns out of order, an empty answer, an image out of
    place, a cut through the image, or nothing left to learn; ModelError if the tokenizer lacks the template's tokens.
    """
    _check_turns(turns, "assistant", template, where)
    ids, labels, image_start = _encode(turns, template, tokenizer, image_token_id, num_image_tokens, where)
    image_end = 0 if image_start is None else image_start + num_image_tokens
    if image_end > max_length:
        raise DataError(
            f"{where}: max_length {max_length} would cut through the image, which ends at token {image_end}; "
            "raise max_length"
        )
    total = len(ids)
    del ids[max_length:], labels[max_length:]
    encoded = Encoded(ids, labels, _prefix_length(turns, image_end))
    if encoded.num_supervised == 0:
        raise DataError(
            f"{where}: nothing to learn: all of its answers lie beyond max_length {max_length} (it has {total} tokens); "
            "raise max_length or shorten the question"
        )
    return encoded


def encode_prompt(
    turns: Sequence[Turn],
    template: Template,
    tokenizer: Tokenizer,
    *,
    image_token_id: int,
    num_image_tokens: int,
    where: str,
) -> Encoded:
    """Encode turns that end with the user's, up to the place where the answer begins; nothing is cut or supervised.

    Raises DataError naming `where`, ModelError if the tokenizer lacks the template's tokens.
    """
    _check_turns(turns, "user", template, where)
    ids, _, image_start = _encode(turns, template, tokenizer, image_token_id, num_image_tokens, where)
    image_end = 0 if image_start is None else image_start + num_image_tokens
    return Encoded(ids, [IGNORE_INDEX] * len(ids), _prefix_length(turns, image_end))


def _prefix_length(turns: Sequence[Turn], image_end: int) -> int:
    return image_end if IMAGE_PLACEHOLDER in turns[0].text else 0


def _check_turns(turns: Sequence[Turn], last: str, template: Template, where: str) -> None:
    """Raise DataError unless the turns alternate, end with `last`, and hold at most one image, in a user turn."""
    images = 0
    for index, turn in enumerate(turns):
        place = f"{where}: turn {index + 1}"
        expected = "user" if index % 2 == 0 else "assistant"
        if turn.role != expected:
            raise DataError(
                f"{place}: is of the {turn.role}, must be of the {expected}; turns alternate, user first"
            )
        if turn.role == "assistant":
            if not turn.text.strip():
                raise DataError(f"{place}: the answer is empty; write one or remove the record")
            if IMAGE_PLACEHOLDER in turn.text:
                raise DataError(f"{place}: {IMAGE_PLACEHOLDER} in an answer; it belongs in a user turn")
        else:
            images += turn.text.count(IMAGE_PLACEHOLDER)
    if not turns or turns[-1].role != last:
        got = f"the {turns[-1].role}'s" if turns else "missing"
        raise DataError(f"{where}: the last turn is {got}, must be the {last}'s; add it or remove the record")
    if images > 1:
        raise DataError(
            f"{where}: {images} times {IMAGE_PLACEHOLDER}, at most one is allowed; split the record"
        )
    if template.caption_only and (images == 0 or len(turns) > 2):
        raise DataError(
            f"{where}: template {template.name} takes one image and its caption, got {len(turns)} turns and "
            f"{images} images; use another template or remove the record"
        )


class _Anchor(NamedTuple):
    """The template's text right before a record's text: tokenised along with it, then dropped.

    Otherwise a tokenizer that begins every text with a space piece would put one there.
    """

    text: str
    ids: list[int]
    space: str
    """Spaces that end the template's text; they are tokenised as the start of what follows."""


class _Pieces(NamedTuple):
    """The constant parts of a template as ids of one tokenizer."""

    bos: list[int]
    opening: list[int]
    opening_image: list[int]
    """As it is before an image: with the spaces that otherwise belong to the following text."""
    again: list[int]
    """From the end of an answer (excluded) to the next user text."""
    again_image: list[int]
    assistant_text: str
    """Start of the answer's turn, where it is plain text and so is tokenised with the question."""
    assistant: list[int]
    """The same where it begins with a marker."""
    end: list[int]
    end_text: str
    """The end of an answer where it is plain text and so is tokenised with the answer."""
    user_anchor: _Anchor
    answer_anchor: _Anchor


class _Text(NamedTuple):
    """A text of the record on its way to ids."""

    text: str
    anchor: _Anchor


_NO_ANCHOR = _Anchor("", [], "")


def _ids(tokenizer: Tokenizer, texts: list[str], *, trusted: bool) -> list[list[int]]:
    """Tokenise texts, without BOS; special tokens in them are parsed only where they are `trusted`."""
    result: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=not trusted, return_attention_mask=False
    )["input_ids"]
    return result


def _anchor(tokenizer: Tokenizer, literal: str, markers: tuple[str, ...]) -> _Anchor:
    text = literal
    for marker in markers:
        text = text.rpartition(marker)[2]
    stripped = text.rstrip(" ")
    return _Anchor(
        stripped, _ids(tokenizer, [stripped], trusted=False)[0] if stripped else [], text[len(stripped) :]
    )


@lru_cache(maxsize=8)
def _pieces(tokenizer: Any, template: Template) -> _Pieces:
    """Tokenise what is the same in every conversation."""

    def ids(text: str) -> list[int]:
        return _ids(tokenizer, [text], trusted=True)[0] if text else []

    markers = template.markers
    if template.end is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"template {template.name} ends an answer with the end token; the tokenizer has none"
            )
        markers = (str(tokenizer.eos_token),)
    for marker in markers:
        if len(ids(marker)) != 1:
            raise ModelError(f"template {template.name} needs the token {marker}, which the tokenizer lacks")
    end_text = "" if template.end is None or template.end in markers else template.end
    end = markers[0] if template.end is None else template.end
    again = template.separator + template.user_prefix
    joined = not template.assistant_prefix.startswith(markers)
    answer_anchor = _anchor(tokenizer, template.assistant_prefix.lstrip(" "), markers)
    first = tokenizer([""], add_special_tokens=True)["input_ids"][0][:1]
    return _Pieces(
        bos=first if first == [tokenizer.bos_token_id] else [],
        opening=ids(template.opening.rstrip(" ")),
        opening_image=ids(template.opening),
        # Tokenised after the end token, as it will stand, which may differ from the start of a text.
        again=[] if end_text else ids(end + again.rstrip(" "))[1:],
        again_image=[] if end_text else ids(end + again)[1:],
        assistant_text=template.assistant_prefix.rstrip(" ") if joined else "",
        assistant=[] if joined else ids(template.assistant_prefix),
        end=[] if end_text else ids(end),
        end_text=end_text,
        user_anchor=_anchor(tokenizer, template.user_prefix, markers),
        answer_anchor=answer_anchor,
    )


def _encode(
    turns: Sequence[Turn],
    template: Template,
    tokenizer: Tokenizer,
    image_token_id: int,
    num_image_tokens: int,
    where: str,
) -> tuple[list[int], list[int], int | None]:
    """Return ids, labels and the position of the first image token (None without an image)."""
    try:
        pieces = _pieces(tokenizer, template)
    except ModelError as error:
        raise ModelError(f"{where}: {error}; choose another template") from None
    texts = [
        _user_text(turn.text, template, pieces) if turn.role == "user" else _answer_text(turn.text, pieces)
        for turn in turns
    ]
    encoded = _encode_texts(texts, tokenizer)
    ids = list(pieces.bos)
    labels = [IGNORE_INDEX] * len(ids)
    image_start: int | None = None
    for index, (turn, own) in enumerate(zip(turns, encoded, strict=True)):
        if turn.role == "assistant":
            ids += own
            ids += pieces.end
            labels += own
            labels += pieces.end
            continue
        if IMAGE_PLACEHOLDER in turn.text:
            ids += pieces.again_image if index else pieces.opening_image
            image_start = len(ids)
            ids += [image_token_id] * num_image_tokens
        else:
            ids += pieces.again if index else pieces.opening
        ids += own
        ids += pieces.assistant
        labels += [IGNORE_INDEX] * (len(ids) - len(labels))
    return ids, labels, image_start


def _user_text(text: str, template: Template, pieces: _Pieces) -> _Text:
    if template.caption_only:
        return _Text("", _NO_ANCHOR)
    if IMAGE_PLACEHOLDER in text:
        # As LLaVA does: the image moves to the front of its turn, a line of its own.
        words = text.replace(IMAGE_PLACEHOLDER, "").strip()
        return _Text((f"\n{words}" if words else "") + pieces.assistant_text, _NO_ANCHOR)
    anchor = pieces.user_anchor
    return _Text(anchor.space + text + pieces.assistant_text, anchor)


def _answer_text(text: str, pieces: _Pieces) -> _Text:
    anchor = pieces.answer_anchor
    return _Text(anchor.space + text + pieces.end_text, anchor)


def _encode_texts(texts: list[_Text], tokenizer: Tokenizer) -> list[list[int]]:
    """Tokenise the texts of a conversation in one call."""
    encoded = _ids(tokenizer, [text.anchor.text + text.text for text in texts], trusted=False)
    for index, text in enumerate(texts):
        width = len(text.anchor.ids)
        if encoded[index][:width] == text.anchor.ids:
            encoded[index] = encoded[index][width:]
        else:
            # The text starts with something that melts into the anchor, such as a second line feed.
            encoded[index] = _ids(tokenizer, [text.text], trusted=False)[0]
    return encoded
