"""From turns to `input_ids` and `labels`, made together, piece by piece.

Contract: for `vicuna_v1` and `plain` both equal what the original LLaVA-1.5 preprocessing gives. A prompt is cut
at the image; what stands before it and what stands after it are tokenised apart, so every conversation about an
image starts with the same tokens, and the ids of a prompt are a prefix of the ids of the answered prompt.

Text of a record never becomes a special token: only the template's own markers are parsed as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lora_llava.conversation.templates import (
    NO_ANCHOR,
    TEMPLATES,
    Anchor,
    Pieces,
    Template,
    Tokenizer,
    get_template,
    template_pieces,
    tokenise,
)
from lora_llava.errors import DataError, ModelError
from lora_llava.system.text import counted

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_PLACEHOLDER",
    "TEMPLATES",
    "Encoded",
    "Template",
    "Tokenizer",
    "Turn",
    "check_turns",
    "encode",
    "encode_prompt",
    "get_template",
]

IGNORE_INDEX = -100
"""Label of a token that is no target of the loss."""
IMAGE_PLACEHOLDER = "<image>"


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
    is_cut: bool = False
    """Whether text beyond the maximum length was left out."""

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
    check_turns(turns, "assistant", where)
    _check_template(turns, template, where)
    ids, labels, image_start = _encode(turns, template, tokenizer, image_token_id, num_image_tokens, where)
    image_end = 0 if image_start is None else image_start + num_image_tokens
    if image_end > max_length:
        raise DataError(
            f"{where}: max_length {max_length} would cut through the image, which ends at token {image_end}; "
            "raise max_length"
        )
    total = len(ids)
    del ids[max_length:], labels[max_length:]
    encoded = Encoded(ids, labels, _prefix_length(turns, image_end), total > max_length)
    if encoded.num_supervised == 0:
        raise DataError(
            f"{where}: nothing to learn: of its {total} tokens, all answers lie beyond max_length {max_length}; "
            "raise max_length or shorten the question",
            "unsupervised",
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
    check_turns(turns, "user", where)
    _check_template(turns, template, where)
    ids, _, image_start = _encode(turns, template, tokenizer, image_token_id, num_image_tokens, where)
    image_end = 0 if image_start is None else image_start + num_image_tokens
    return Encoded(ids, [IGNORE_INDEX] * len(ids), _prefix_length(turns, image_end))


def _prefix_length(turns: Sequence[Turn], image_end: int) -> int:
    return image_end if IMAGE_PLACEHOLDER in turns[0].text else 0


def check_turns(turns: Sequence[Turn], last: str, where: str) -> None:
    """Raise DataError unless the turns alternate, end with `last`, and hold at most one image, in a user turn."""
    images = 0
    for index, turn in enumerate(turns):
        place = f"{where}: turn {index + 1}"
        expected = "user" if index % 2 == 0 else "assistant"
        if turn.role != expected:
            raise DataError(f"{place}: is of the {turn.role}, must be of the {expected}; turns alternate, user first")
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
        raise DataError(f"{where}: {images} times {IMAGE_PLACEHOLDER}, at most one is allowed; split the record")


def _check_template(turns: Sequence[Turn], template: Template, where: str) -> None:
    images = sum(IMAGE_PLACEHOLDER in turn.text for turn in turns)
    if template.caption_only and (images == 0 or len(turns) > 2):
        raise DataError(
            f"{where}: template {template.name} takes one image and its caption, got {counted(len(turns), 'turn')} and "
            f"{counted(images, 'image')}; use another template or remove the record"
        )


class _Text(NamedTuple):
    """A text of the record on its way to ids."""

    text: str
    anchor: Anchor


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
        pieces = template_pieces(tokenizer, template)
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


def _user_text(text: str, template: Template, pieces: Pieces) -> _Text:
    if template.caption_only:
        return _Text("", NO_ANCHOR)
    if IMAGE_PLACEHOLDER in text:
        # As LLaVA does: the image moves to the front of its turn, a line of its own.
        words = text.replace(IMAGE_PLACEHOLDER, "").strip()
        return _Text((f"\n{words}" if words else "") + pieces.assistant_text, NO_ANCHOR)
    anchor = pieces.user_anchor
    return _Text(anchor.space + text + pieces.assistant_text, anchor)


def _answer_text(text: str, pieces: Pieces) -> _Text:
    anchor = pieces.answer_anchor
    return _Text(anchor.space + text + pieces.end_text, anchor)


def _encode_texts(texts: list[_Text], tokenizer: Tokenizer) -> list[list[int]]:
    """Tokenise the texts of a conversation in one call."""
    encoded = tokenise(tokenizer, [text.anchor.text + text.text for text in texts], trusted=False)
    for index, text in enumerate(texts):
        width = len(text.anchor.ids)
        if encoded[index][:width] == text.anchor.ids:
            encoded[index] = encoded[index][width:]
        else:
            # The text starts with something that melts into the anchor, such as a second line feed.
            encoded[index] = tokenise(tokenizer, [text.text], trusted=False)[0]
    return encoded
