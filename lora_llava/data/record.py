"""What a record is, and where its image may lie."""

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
"""A value of the data's own keys."""
MAX_CHARACTERS = 1_000_000
"""Longest text of a record: many times what any model reads, and still tokenised in seconds."""


@dataclass(frozen=True, slots=True)
class ImageSource:
    """One image: a file, or the bytes of one."""

    key: str
    """Identifies the image: its path under the image root, or the sha256 of its bytes."""
    path: Path | None
    data: bytes | StoredBytes | None
    """Of an embedded image: its bytes, or where they are."""
    where: str = field(default="", compare=False)
    """The first record that shows it, for messages."""
    file_name: str = field(default="", compare=False)
    """Of an embedded image: the file name that the data set has for it."""
    window: tuple[float, float] | None = None
    """Values of a grey image of more than 8 bits that become black and white; None: the range it uses."""

    def embedded(self) -> bytes:
        """Return the bytes of an embedded image. Raises OSError if they cannot be read any more."""
        return self.data.read() if isinstance(self.data, StoredBytes) else self.data or b""

    @property
    def label(self) -> str:
        """The image in results: its path below the image root, its file name in the data set, or its hash."""
        return self.file_name or (self.key if self.path is not None else f"sha256:{self.key}")

    @property
    def name(self) -> str:
        """The image in messages: never a path of the user's machine, only one below the image root."""
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
    """Its place in the file or split, from 1."""
    group: str | None = None
    """Value of the settings' `group`: records of one group stay on one side of a split."""
    references: tuple[str, ...] = ()
    """Every acceptable answer to the last question, if the data lists several; the turns hold the first."""
    extra: tuple[tuple[str, Scalar], ...] = ()
    """The data's own keys or columns with flat values, such as a patient; read for an evaluation alone."""

    @property
    def question(self) -> str:
        """The last question, without the image placeholder."""
        asked = next(turn for turn in reversed(self.turns) if turn.role == "user")
        return asked.text.replace(IMAGE_PLACEHOLDER, "").strip()


class ImageRoot:
    """The directory that images lie in; each is looked up once.

    Missing ones are reported together by `check`, or, if `at_once`, whenever a record asks for one.
    """

    def __init__(
        self, root: Path, field_name: str, *, at_once: bool = False, window: tuple[float, float] | None = None
    ) -> None:
        self.root = root
        self.window = window
        self.at_once = at_once
        self.field_name = field_name
        """Field or column of the paths, for messages."""
        self._real_root = os.path.realpath(root)
        self._directories: dict[str, str | None] = {}
        self._sources: dict[str, ImageSource] = {}
        self._missing: dict[str, str] = {}

    def source(self, name: str, where: str) -> ImageSource:
        """Locate an image by its path relative to the root; DataError where the path leads out of it."""
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
        """Raise DataError if an image that was asked for is missing, and that was not said at once."""
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
        place = f"{where}: {self.field_name}: {name[:200]!r}"
        if not name.strip() or "\0" in name:
            raise DataError(f"{place} is not a path; give one relative to image_root", "image_path")
        if _SCHEME.match(name):
            if "//" in name or name[:5].lower() == "file:":
                advice = "is a URL; images are not downloaded: fetch them into image_root first"
            else:
                advice = "is a URL or names a drive; copy the image into image_root and give its path"
            raise DataError(f"{place} {advice}", "image_path")
        path = self._below(name)
        if path is None:
            raise DataError(
                f"{place} must be relative to image_root, or below it, without '..'; shorten it or set image_root",
                "image_path",
            )
        directory, base = os.path.split(path)
        real_directory = self._real_directory(directory)
        if real_directory is None:
            raise DataError(
                f"{place} leads out of image_root through a link; copy the images, or set image_root", "image_path"
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
            raise DataError(f"{place} cannot be looked up: {error.strerror}; correct it", "image_path") from None
        else:
            if not self._inside(real):
                raise DataError(f"{place} is a link out of image_root; copy the image, or set image_root", "image_path")
            if not stat.S_ISREG(mode):
                raise DataError(f"{place} is not a file; correct it", "image_path")
        key = Path(os.path.relpath(real, self._real_root)).as_posix()
        return ImageSource(key, Path(real), None, where, window=self.window)

    def _below(self, name: str) -> str | None:
        """Return a path relative to the root, also of an absolute one that is below it; None if it leads elsewhere."""
        if name.startswith("\\") or ".." in re.split(r"[/\\]", name):
            return None
        path = os.path.normpath(name)
        if not os.path.isabs(path):  # noqa: PTH117 - strings: once for every image
            return path
        # Not the image itself: a link below the root is looked at where it is.
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


def check_text(text: str, place: str) -> str:
    """Return `text`; DataError if it is far too long, or cannot be encoded (half of a surrogate pair)."""
    if len(text) > MAX_CHARACTERS:
        raise DataError(f"{place}: has {len(text):,} characters, at most {MAX_CHARACTERS:,} are read; shorten it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: character {error.start + 1} is half of a surrogate pair; write the text anew as UTF-8"
        ) from None
    return text


def check_group(value: object, place: str) -> str:
    """Return the value of `group` as text; DataError unless it is a string or an integer."""
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        found = "missing" if value is None else f"{value!r:.80}"
        raise DataError(f"{place} is {found}, must be a string or an integer, since data.group names it")
    return check_text(str(value), place)


def own_values(entry: Mapping[str, object], used: Container[str]) -> tuple[tuple[str, Scalar], ...]:
    """Return the keys of a record that are not `used` and hold one flat value; text becomes valid UTF-8, NaN None."""
    kept: list[tuple[str, Scalar]] = []
    for key, value in entry.items():
        if key in used or not (value is None or isinstance(value, str | int | float)):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            value = None
        kept.append((_valid(key), _valid(value) if isinstance(value, str) else value))
    return tuple(kept)


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def with_answer_prompt(text: str, answer_prompt: str | None) -> str:
    """Add the answer prompt to a question as a last line; an image moves to the front, as it does when encoded."""
    if not answer_prompt:
        return text
    if IMAGE_PLACEHOLDER in text:
        words = text.replace(IMAGE_PLACEHOLDER, "").strip()
        images = f"{IMAGE_PLACEHOLDER}\n" * text.count(IMAGE_PLACEHOLDER)
        return images + (f"{words}\n" if words else "") + answer_prompt
    return f"{text}\n{answer_prompt}"


def check_placeholder(turns: Sequence[Turn], image: ImageSource | None, place: str) -> None:
    """Raise DataError unless a user turn says where the image stands exactly if there is one."""
    shown = any(turn.role == "user" and IMAGE_PLACEHOLDER in turn.text for turn in turns)
    if shown and image is None:
        raise DataError(
            f"{place}: {IMAGE_PLACEHOLDER} in the text, but the record has no image; add it or remove the tag"
        )
    if image is not None and not shown:
        raise DataError(
            f"{place}: the record has an image, but no {IMAGE_PLACEHOLDER} in a human turn; "
            f"put {IMAGE_PLACEHOLDER} and a line feed before the first question"
        )
