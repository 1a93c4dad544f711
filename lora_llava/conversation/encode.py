"""Encode turns as `input_ids` and `labels`, built together piece by piece.

Contract: for `vicuna_v1` and `plain`, both equal the output of the original LLaVA-1.5 preprocessing. The text before
and after the image is tokenized separately, so that all conversations about an image start with the same tokens. The
ids of a prompt are a prefix of the ids of the answered prompt.

Text from records never becomes a special token: only the markers of the template are parsed as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from lora_llava.conversation.templates import (
    NO_ANCHOR,
    Anchor,
    Pieces,
    Template,
    Tokenizer,
    template_pieces,
    tokenize,
)
from lora_llava.errors import DataError, ModelError
from lora_llava.system.text import counted

IGNORE_INDEX = -100
"""Label of tokens that are not supervised."""
IMAGE_PLACEHOLDER = "<image>"


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation; the text of one user turn may contain one `<image>`."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """How `input_ids` represent an image: the token `id`, `count` times."""

    id: int
    count: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as ids; `labels` is as long as `input_ids`, with IGNORE_INDEX at unsupervised tokens.

    Of a preference pair, it is the conversation with the chosen answer, and `rejected` the one with the other.
    """

    input_ids: list[int]
    labels: list[int]
    prefix_length: int
    """Tokens up to the end of an image in the first turn, which all conversations about it share; 0 without one. Of a
    pair: all that both conversations start with, which may include the beginning of their answers."""
    is_cut: bool = False
    """Whether text beyond the maximum length was cut off."""
    rejected: Encoded | None = None
    """The other conversation of a pair, with the same `prefix_length`."""
    reference: tuple[float, float] | None = None
    """Log-probabilities of the chosen and the rejected answer of a pair, by the model that its stage starts from."""

    @property
    def branches(self) -> tuple[Encoded, ...]:
        """The conversations that share the prefix: this one, and of a pair also the rejected one."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def num_supervised(self) -> int:
        """Number of tokens that contribute to the loss."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)


def encode(
    turns: Sequence[Turn],
    template: Template,
    tokenizer: Tokenizer,
    image_tokens: ImageTokens,
    *,
    max_length: int,
    where: str,
    system: str | None = None,
) -> Encoded:
    """Encode an answered conversation and cut it off after `max_length` tokens.

    `system` replaces the template's system prompt; unlike that, it is not trusted.

    Raises DataError, which begins with `where` (file and record), for turns out of order, an empty answer, a misplaced
    image, a cut through the image, or no supervised token; ModelError if the tokenizer lacks the template's tokens.
    """
    template = _with_system(template, tokenizer, system, where)
    whole, image_end = _encode(turns, "assistant", template, tokenizer, image_tokens, where)
    if image_end > max_length:
        raise DataError(
            f"{where}: max_length {max_length} would cut through the image, which ends at token {image_end}; "
            "raise max_length"
        )
    total = len(whole.input_ids)
    encoded = Encoded(whole.input_ids[:max_length], whole.labels[:max_length], whole.prefix_length, total > max_length)
    if encoded.num_supervised == 0:
        raise DataError(
            f"{where}: nothing to train on: of its {total} tokens, all answers lie beyond max_length {max_length}; "
            "raise max_length or shorten the question",
            "unsupervised",
        )
    return encoded


def encode_prompt(
    turns: Sequence[Turn],
    template: Template,
    tokenizer: Tokenizer,
    image_tokens: ImageTokens,
    *,
    where: str,
    system: str | None = None,
) -> Encoded:
    """Encode turns that end with the user's, up to the start of the answer; nothing is cut off or supervised.

    Raises DataError, which begins with `where`, as `encode` does; ModelError if the tokenizer lacks the template's
    tokens.
    """
    template = _with_system(template, tokenizer, system, where)
    whole, _ = _encode(turns, "user", template, tokenizer, image_tokens, where)
    return Encoded(whole.input_ids, [IGNORE_INDEX] * len(whole.input_ids), whole.prefix_length)


def _with_system(template: Template, tokenizer: Tokenizer, system: str | None, where: str) -> Template:
    """Return the template with a record's system prompt; DataError if that holds special tokens."""
    if system is None or template.caption_only:
        return template
    # The template's own text is trusted: special tokens in it are parsed, and those of a record must not be.
    if tokenize(tokenizer, [system], trusted=True) != tokenize(tokenizer, [system], trusted=False):
        raise DataError(f"{where}: the system prompt {system!r:.80} holds a special token; remove it")
    return replace(template, system=system)


def check_turns(turns: Sequence[Turn], last: str, where: str) -> None:
    """Raise DataError unless the turns alternate, end with role `last`, and have at most one image, in a user turn."""
    images = 0
    for index, turn in enumerate(turns):
        turn_name = f"{where}: turn {index + 1}"
        expected = "user" if index % 2 == 0 else "assistant"
        if turn.role != expected:
            raise DataError(
                f"{turn_name}: role is {turn.role!r}, expected {expected!r}; turns alternate, starting with the user"
            )
        if turn.role == "assistant":
            if not turn.text.strip():
                raise DataError(f"{turn_name}: the answer is empty; write one or remove the record")
            if IMAGE_PLACEHOLDER in turn.text:
                raise DataError(f"{turn_name}: {IMAGE_PLACEHOLDER} is in an answer; it belongs in a user turn")
        else:
            images += turn.text.count(IMAGE_PLACEHOLDER)
    if not turns or turns[-1].role != last:
        got = f"from role {turns[-1].role!r}" if turns else "missing"
        raise DataError(f"{where}: the last turn is {got}, expected {last!r}; add it or remove the record")
    if images > 1:
        raise DataError(
            f"{where}: {IMAGE_PLACEHOLDER} occurs {images} times, at most once is allowed; split the record"
        )


def check_template(turns: Sequence[Turn], template: Template, where: str) -> None:
    """Raise DataError for turns that the template cannot express."""
    images = sum(IMAGE_PLACEHOLDER in turn.text for turn in turns)
    if template.caption_only and (images == 0 or len(turns) > 2):
        raise DataError(
            f"{where}: template {template.name} takes one image and its caption, got {counted(len(turns), 'turn')} and "
            f"{counted(images, 'image')}; use another template or remove the record"
        )


class _Text(NamedTuple):
    """A text of the record, and the template text before it."""

    text: str
    anchor: Anchor


def _encode(
    turns: Sequence[Turn], last: str, template: Template, tokenizer: Tokenizer, image_tokens: ImageTokens, where: str
) -> tuple[Encoded, int]:
    """Encode turns that end with role `last`, whole; also return where the image ends, 0 without an image."""
    check_turns(turns, last, where)
    check_template(turns, template, where)
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
    image_end = 0
    for index, (turn, text_ids) in enumerate(zip(turns, encoded, strict=True)):
        if turn.role == "assistant":
            ids += text_ids
            ids += pieces.end
            labels += text_ids
            labels += pieces.end
            continue
        if IMAGE_PLACEHOLDER in turn.text:
            ids += pieces.again_image if index else pieces.opening_image
            ids += [image_tokens.id] * image_tokens.count
            image_end = len(ids)
        else:
            ids += pieces.again if index else pieces.opening
        ids += text_ids
        ids += pieces.assistant
        labels += [IGNORE_INDEX] * (len(ids) - len(labels))
    # Conversations share an image only in their first turn.
    return Encoded(ids, labels, image_end if IMAGE_PLACEHOLDER in turns[0].text else 0), image_end


def _user_text(text: str, template: Template, pieces: Pieces) -> _Text:
    if template.caption_only:
        return _Text("", NO_ANCHOR)
    if IMAGE_PLACEHOLDER in text:
        # As in LLaVA, the image moves to the front of its turn, on a separate line.
        words = text.replace(IMAGE_PLACEHOLDER, "").strip()
        return _Text((f"\n{words}" if words else "") + pieces.assistant_text, NO_ANCHOR)
    anchor = pieces.user_anchor
    return _Text(anchor.space + text + pieces.assistant_text, anchor)


def _answer_text(text: str, pieces: Pieces) -> _Text:
    anchor = pieces.answer_anchor
    return _Text(anchor.space + text + pieces.end_text, anchor)


def _encode_texts(texts: list[_Text], tokenizer: Tokenizer) -> list[list[int]]:
    """Tokenize the texts of a conversation in one call."""
    encoded = tokenize(tokenizer, [text.anchor.text + text.text for text in texts], trusted=False)
    for index, text in enumerate(texts):
        width = len(text.anchor.ids)
        if encoded[index][:width] == text.anchor.ids:
            encoded[index] = encoded[index][width:]
        else:
            # The start of the text merged with the anchor into one token, such as two line feeds.
            encoded[index] = tokenize(tokenizer, [text.text], trusted=False)[0]
    return encoded
