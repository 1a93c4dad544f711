"""A record and its image."""

from __future__ import annotations

import io
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from lora_llava.conversation.encode import IMAGE_PLACEHOLDER, Turn
from lora_llava.data.sources.stored.ranges import StoredBytes
from lora_llava.errors import DataError
from lora_llava.system.text import printable

Scalar = str | int | float | bool | None
"""A value of an additional key or column of the data."""
MAX_CHARACTERS = 1_000_000
"""Longest text of a record: far more than any model reads, and still tokenized in seconds."""


@dataclass(frozen=True, slots=True)
class ImageSource:
    """One image: a file, or embedded bytes."""

    key: str
    """Names the image within one source: its path under the image root, or the sha256 of its bytes."""
    path: Path | None
    data: bytes | StoredBytes | None
    """The bytes of an embedded image, or where they are stored."""
    where: str = field(default="", compare=False)
    """The first record with this image, for messages."""
    file_name: str = field(default="", compare=False)
    """The file name of an embedded image in its dataset."""
    window: tuple[float, float] | None = None
    """Values that become black and white in a grayscale image of more than 8 bits; None: the range that it uses."""

    asked: str = field(default="", compare=False)
    """The file name in the data, if the file has another extension."""

    @property
    def identity(self) -> str:
        """Identifies the image over all sources: its path without links, or the sha256 of its bytes."""
        return self.key if self.path is None else str(self.path)

    def embedded(self) -> bytes:
        """Return the bytes of an embedded image; OSError if they can no longer be read."""
        return self.data.read() if isinstance(self.data, StoredBytes) else self.data or b""

    def open(self) -> BinaryIO:
        """Open the image as a file, of which only what is asked for is read; OSError if it cannot be opened."""
        if self.path is not None:
            return self.path.open("rb")
        return self.data.open() if isinstance(self.data, StoredBytes) else io.BytesIO(self.data or b"")

    @property
    def label(self) -> str:
        """The image in results: its path below the image root, its file name in the dataset, or its hash."""
        return self.file_name or (self.key if self.path is not None else f"sha256:{self.key}")

    @property
    def name(self) -> str:
        """The image in messages: a path below the image root, never an absolute one."""
        name = printable(self.key, 200) if self.path is not None else f"embedded image {self.key[:12]}"
        return f"{self.where}, image {name}" if self.where else name


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a data file."""

    id: str
    image: ImageSource | None
    turns: tuple[Turn, ...]
    where: str
    """File, number and id, for messages: `train.json, record 17 (id 000123)`."""
    number: int = 0
    """Its number in the file or split, counted from 1."""
    group: str | None = None
    """Value of the `group` key: records of one group stay in one split."""
    references: tuple[str, ...] = ()
    """All acceptable answers to the last question, if the data lists several; the turns hold one."""
    system: str | None = None
    """System prompt in the data; None: that of the stage."""
    extra: tuple[tuple[str, Scalar], ...] = ()
    """Additional keys or columns with flat values, such as a patient; read only for an evaluation."""
    source: str = ""
    """Name of its source, of several that a stage mixes; empty for the only one."""
    rejected: str | None = None
    """A worse last answer than that of `turns`, in preference data; only stage `prefer` trains on it."""

    @property
    def question(self) -> str:
        """The last question, without the image placeholder."""
        turn = next(turn for turn in reversed(self.turns) if turn.role == "user")
        return turn.text.replace(IMAGE_PLACEHOLDER, "").strip()


def check_text(text: str, location: str) -> str:
    """Return `text`; DataError if it is too long, or not valid Unicode (half of a surrogate pair)."""
    if len(text) > MAX_CHARACTERS:
        raise DataError(f"{location}: has {len(text):,} characters, at most {MAX_CHARACTERS:,} are read; shorten it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{location}: character {error.start + 1} is half of a surrogate pair; write the text again as UTF-8"
        ) from None
    return text


def check_group(value: object, location: str) -> str:
    """Return the value of the `group` key as text; DataError unless it is a string or an integer."""
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        got = "missing" if value is None else f"{value!r:.80}"
        raise DataError(f"{location} is {got}, must be a string or an integer, since data.group names it")
    return check_text(str(value), location)


def own_values(entry: Mapping[str, object], used: Container[str]) -> tuple[tuple[str, Scalar], ...]:
    """Return a record's keys that are not `used` and have flat values; text becomes valid UTF-8, NaN None."""
    values: list[tuple[str, Scalar]] = []
    for key, value in entry.items():
        if key in used or not (value is None or isinstance(value, str | int | float)):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            value = None
        values.append((_valid(key), _valid(value) if isinstance(value, str) else value))
    return tuple(values)


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def with_answer_prompt(turns: Sequence[Turn], answer_prompt: str | None) -> tuple[Turn, ...]:
    """Append the answer prompt to every question as a new line; an image moves to the front, as in encoding."""
    if not answer_prompt:
        return tuple(turns)
    return tuple(Turn("user", _with_line(turn.text, answer_prompt)) if turn.role == "user" else turn for turn in turns)


def _with_line(text: str, answer_prompt: str) -> str:
    if IMAGE_PLACEHOLDER in text:
        words = text.replace(IMAGE_PLACEHOLDER, "").strip()
        images = f"{IMAGE_PLACEHOLDER}\n" * text.count(IMAGE_PLACEHOLDER)
        return images + (f"{words}\n" if words else "") + answer_prompt
    return f"{text}\n{answer_prompt}"


def check_placeholder(turns: Sequence[Turn], image: ImageSource | None, location: str) -> None:
    """Raise DataError if there is an image but no placeholder in a user turn, or a placeholder but no image."""
    shown = False
    for turn in turns:
        shown = shown or (turn.role == "user" and IMAGE_PLACEHOLDER in turn.text)
    if shown and image is None:
        raise DataError(
            f"{location}: {IMAGE_PLACEHOLDER} in the text, but the record has no image; add it or remove the tag"
        )
    if image is not None and not shown:
        raise DataError(
            f"{location}: the record has an image, but no {IMAGE_PLACEHOLDER} in a human turn; "
            f"put {IMAGE_PLACEHOLDER} and a line feed before the first question"
        )
