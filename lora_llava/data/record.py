"""A record and its image; images are located below the image root."""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_llava.conversation.encode import IMAGE_PLACEHOLDER, Turn
from lora_llava.data.sources.arrow_cache import StoredBytes
from lora_llava.errors import DataError
from lora_llava.system.text import counted, printable

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")
_NUM_NAMED = 5
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

    @property
    def identity(self) -> str:
        """Identifies the image over all sources: its path without links, or the sha256 of its bytes."""
        return self.key if self.path is None else str(self.path)

    def embedded(self) -> bytes:
        """Return the bytes of an embedded image; OSError if they can no longer be read."""
        return self.data.read() if isinstance(self.data, StoredBytes) else self.data or b""

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
    rejected: str | None = None
    """A worse last answer than that of `turns`, in preference data; only stage `prefer` trains on it."""

    @property
    def question(self) -> str:
        """The last question, without the image placeholder."""
        turn = next(turn for turn in reversed(self.turns) if turn.role == "user")
        return turn.text.replace(IMAGE_PLACEHOLDER, "").strip()


class ImageRoot:
    """The directory of the images; each image is located once.

    Missing images are reported together by `check`, or, with `at_once`, when a record refers to one.
    """

    def __init__(
        self, root: Path, field_name: str, *, at_once: bool = False, window: tuple[float, float] | None = None
    ) -> None:
        self.root = root
        self.window = window
        self.at_once = at_once
        self.field_name = field_name
        """Name of the field or column with the paths, for messages."""
        self._real_root = os.path.realpath(root)
        self._directories: dict[str, str | None] = {}
        self._sources: dict[str, ImageSource] = {}
        self._missing: dict[str, str] = {}

    def source(self, name: str, where: str) -> ImageSource:
        """Locate an image by its path relative to the root; DataError if the path leads out of it."""
        known = self._sources.get(name)
        if known is None:
            known = self._sources[name] = self._locate(name, where)
        if self.at_once and name in self._missing:
            raise DataError(
                f"{where}: {self.field_name}: {name[:200]!r} is missing; restore it, or leave the record out",
                "missing_image",
            )
        return known

    def check(self) -> None:
        """Raise DataError if images are missing; with `at_once`, they were reported before."""
        if self.at_once or not self._missing:
            return
        named = [f"{printable(name, 200)} ({where})" for name, where in list(self._missing.items())[:_NUM_NAMED]]
        more = len(self._missing) - len(named)
        raise DataError(
            f"{self.field_name}: {len(self._missing):,} of {counted(len(self._sources), 'image')} "
            f"{'is' if len(self._missing) == 1 else 'are'} missing in {printable(str(self.root))}: "
            f"{'; '.join(named)}{f'; and {more:,} more' if more else ''}. "
            "Correct image_root, or remove their records; lora-llava check lists them all",
            "missing_image",
        )

    def _locate(self, name: str, where: str) -> ImageSource:
        location = f"{where}: {self.field_name}: {name[:200]!r}"
        if not name.strip() or "\0" in name:
            raise DataError(f"{location} is not a path; give one relative to image_root", "image_path")
        if _SCHEME.match(name):
            if "//" in name or name[:5].lower() == "file:":
                advice = "is a URL; images are not downloaded: fetch them into image_root first"
            else:
                advice = "is a URL or names a drive; copy the image into image_root and give its path"
            raise DataError(f"{location} {advice}", "image_path")
        path = self._below(name)
        if path is None:
            raise DataError(
                f"{location} must be relative to image_root, or below it, without '..'; shorten it or set image_root",
                "image_path",
            )
        directory, base = os.path.split(path)
        real_directory = self._real_directory(directory)
        if real_directory is None:
            raise DataError(
                f"{location} leads out of image_root through a link; copy the images, or set image_root", "image_path"
            )
        real = os.path.join(real_directory, base)  # noqa: PTH118 - strings: once for every image
        try:
            mode = os.lstat(real).st_mode
            if stat.S_ISLNK(mode):
                real = os.path.realpath(real)
                mode = os.stat(real).st_mode  # noqa: PTH116
        except FileNotFoundError:
            self._missing[name] = where
        except OSError as error:
            raise DataError(f"{location} cannot be looked up: {error.strerror}; correct it", "image_path") from None
        else:
            if not self._inside(real):
                raise DataError(
                    f"{location} is a link out of image_root; copy the image, or set image_root", "image_path"
                )
            if not stat.S_ISREG(mode):
                raise DataError(f"{location} is not a file; correct it", "image_path")
        key = Path(os.path.relpath(real, self._real_root)).as_posix()
        return ImageSource(key, Path(real), None, where, window=self.window)

    def _below(self, name: str) -> str | None:
        """Return the path relative to the root, even if it is absolute; None if it leads out of the root."""
        if name.startswith("\\") or ".." in re.split(r"[/\\]", name):
            return None
        path = os.path.normpath(name)
        if not os.path.isabs(path):  # noqa: PTH117 - strings: once for every image
            return path
        # Resolve only the directory: a link below the root is checked by its own location.
        directory = os.path.realpath(os.path.dirname(path))  # noqa: PTH120
        if not self._inside(directory):
            return None
        return os.path.relpath(os.path.join(directory, os.path.basename(path)), self._real_root)  # noqa: PTH118, PTH119

    def _real_directory(self, directory: str) -> str | None:
        if directory not in self._directories:
            real = os.path.realpath(os.path.join(self._real_root, directory))  # noqa: PTH118
            self._directories[directory] = real if self._inside(real) else None
        return self._directories[directory]

    def _inside(self, real: str) -> bool:
        return real == self._real_root or real.startswith(self._real_root.rstrip(os.sep) + os.sep)


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
    shown = any(turn.role == "user" and IMAGE_PLACEHOLDER in turn.text for turn in turns)
    if shown and image is None:
        raise DataError(
            f"{location}: {IMAGE_PLACEHOLDER} in the text, but the record has no image; add it or remove the tag"
        )
    if image is not None and not shown:
        raise DataError(
            f"{location}: the record has an image, but no {IMAGE_PLACEHOLDER} in a human turn; "
            f"put {IMAGE_PLACEHOLDER} and a line feed before the first question"
        )
