"""Locate the images of records below the directories that the data settings name."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from pathlib import Path

from lora_llava.data.record import ImageSource
from lora_llava.errors import DataError
from lora_llava.recipe.stages import DataSettings
from lora_llava.system.text import counted, listed, printable

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Extensions of image files, in lower case. They may stand for each other: files are judged by their content."""
_NUM_NAMED = 5
_MAX_FOLDERS = 200
"""Maximum number of folders in which a missing image is searched for."""


class ImageRoot:
    """The directories of the images; each image is located once.

    Paths are relative to `root`. An image lies below it or below one of `data.image_roots`, also behind links. A file
    that is missing, but exists with one other extension, or accents in another form of Unicode, is taken;
    `ImageSource.asked` then has the name in the data. Backslashes, as Windows writes paths, are read as slashes.

    Missing images are reported together by `check`, or, with `at_once`, when a record refers to one.
    """

    def __init__(self, root: Path, field_name: str, data: DataSettings | None = None, *, at_once: bool = False) -> None:
        self.root = root
        self.window = None if data is None else data.gray_window
        self.at_once = at_once
        self.field_name = field_name
        """Name of the field or column with the paths, for messages."""
        self._real_root = os.path.realpath(root)
        others = (os.path.realpath(other) for other in (data.image_roots if data else ()))
        self._prefixes = {root: root.rstrip(os.sep) + os.sep for root in (self._real_root, *others)}
        """By root: how paths below it start."""
        self._directories: dict[str, str | None] = {}
        self._stems: dict[str, dict[str, list[str]]] = {}
        """By directory and name without extension: the image files in it. Filled for directories that lack a file."""
        self._sources: dict[str, ImageSource] = {}
        self._missing: dict[str, str] = {}

    def source(self, name: str, where: str) -> ImageSource:
        """Locate an image by its path relative to the root; DataError if the path leads out of all roots."""
        known = self._sources.get(name)
        if known is None:
            known = self._sources[name] = self._locate(name, where)
        if self.at_once and name in self._missing:
            raise DataError(
                f"{where}: {self.field_name}: {name[:200]!r} is missing{self._hint(name)}; restore it, or leave the "
                "record out",
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
            f"{'; '.join(named)}{f'; and {more:,} more' if more else ''}{self._hint(next(iter(self._missing)))}. "
            "Correct image_root, or remove their records; lora-llava check lists them all",
            "missing_image",
        )

    def _locate(self, name: str, where: str) -> ImageSource:
        location = f"{where}: {self.field_name}: {name[:200]!r}"
        directory, base = os.path.split(self._relative(name, location))
        real_directory = self._real_directory(directory)
        if real_directory is None:
            raise DataError(
                f"{location} leads out of image_root through a link; copy the images, or name the directory that the "
                "link leads to in image_roots",
                "image_path",
            )
        real = os.path.join(real_directory, base)  # noqa: PTH118 - strings: once for every image
        asked = ""
        try:
            try:
                mode = os.lstat(real).st_mode
            except FileNotFoundError:
                if (other := self._other_extension(real_directory, base, name, where)) is None:
                    raise
                real, asked = os.path.join(real_directory, other), base  # noqa: PTH118
                mode = os.lstat(real).st_mode
            if stat.S_ISLNK(mode):
                real = os.path.realpath(real)
                mode = os.stat(real).st_mode  # noqa: PTH116
        except FileNotFoundError:
            self._missing.setdefault(name, where)
        except OSError as error:
            raise DataError(f"{location} cannot be looked up: {error.strerror}; correct it", "image_path") from None
        else:
            if self._root_of(real) is None:
                raise DataError(
                    f"{location} is a link out of image_root; copy the image, or name the directory that the link "
                    "leads to in image_roots",
                    "image_path",
                )
            if not stat.S_ISREG(mode):
                raise DataError(f"{location} is not a file; correct it", "image_path")
        return ImageSource(self._key(real), Path(real), None, where, window=self.window, asked=asked)

    def _relative(self, name: str, location: str) -> str:
        """Return a path relative to the first root, even if it is absolute; DataError if it leads out of all roots."""
        if not name.strip() or "\0" in name:
            raise DataError(f"{location} is not a path; give one relative to image_root", "image_path")
        if _SCHEME.match(name):
            if "//" in name or name[:5].lower() == "file:":
                advice = "is a URL; images are not downloaded: fetch them into image_root first"
            else:
                advice = "is a URL or names a drive; copy the image into image_root and give its path"
            raise DataError(f"{location} {advice}{self._hint(name)}", "image_path")
        path = None
        if not name.startswith("\\") and ".." not in re.split(r"[/\\]", name):
            path = self._below(os.path.normpath(self._with_slashes(name)))
        if path is None:
            raise DataError(
                f"{location} must be relative to image_root, or below it, without '..'; shorten it or set image_root"
                f"{self._hint(name)}",
                "image_path",
            )
        return path

    def _with_slashes(self, name: str) -> str:
        """Return a path as it is, if it exists or has no backslashes; with slashes for them otherwise."""
        is_there = "\\" not in name or os.path.lexists(os.path.join(self._real_root, name))  # noqa: PTH118
        return name if is_there else name.replace("\\", "/")

    def _hint(self, name: str) -> str:
        """Return where below the first root an image may be that is not at `name`, as an addition to a message."""
        parts = [part for part in re.split(r"[/\\]+", name) if part not in ("", ".")]
        if not parts or ".." in parts or "\0" in name:
            return ""
        near = [*parts[:-1], self._in_other_case(parts)]
        shorter = ["/".join(parts[start:]) for start in range(1, len(parts))]
        deeper = [f"{folder}/{'/'.join(parts)}" for folder in _names_in(self._real_root)[:_MAX_FOLDERS]]
        for path in ("/".join(near), *shorter, *deeper):
            if os.path.isfile(os.path.join(self._real_root, path)):  # noqa: PTH113, PTH118
                return f"; there is {printable(path, 200)!r} in image_root"
        return ""

    def _in_other_case(self, parts: list[str]) -> str:
        """Return the file of a directory whose name differs from the last part of a path in its case alone."""
        names = _names_in(os.path.join(self._real_root, *parts[:-1]))  # noqa: PTH118
        return next((name for name in names if name.casefold() == parts[-1].casefold()), parts[-1])

    def _below(self, path: str) -> str | None:
        """Return a normalized path relative to the first root; None if it is absolute and outside of all roots."""
        if not os.path.isabs(path):  # noqa: PTH117 - strings: once for every image
            return path
        # Resolve only the directory: a link below the root is checked by its own location.
        directory = os.path.realpath(os.path.dirname(path))  # noqa: PTH120
        if self._root_of(directory) is None:
            return None
        return os.path.relpath(os.path.join(directory, os.path.basename(path)), self._real_root)  # noqa: PTH118, PTH119

    def _real_directory(self, directory: str) -> str | None:
        if directory not in self._directories:
            real = os.path.realpath(os.path.join(self._real_root, directory))  # noqa: PTH118
            self._directories[directory] = real if self._root_of(real) is not None else None
        return self._directories[directory]

    def _root_of(self, real: str) -> str | None:
        """Return the first root that a path without links lies in; None if it lies in none."""
        for root, prefix in self._prefixes.items():
            if real.startswith(prefix) or real == root:
                return root
        return None

    def _key(self, real: str) -> str:
        """Name an image by its path below its root; below a further root, with the name of that root."""
        root = self._root_of(real) or self._real_root
        key = Path(os.path.relpath(real, root)).as_posix()
        return key if root == self._real_root else f"{os.path.basename(root)}/{key}"  # noqa: PTH119

    def _other_extension(self, directory: str, base: str, name: str, where: str) -> str | None:
        """Return the one image file in a directory that differs from `base` in its extension or form of Unicode.

        If there are several, the image stays missing, and they are named with it.
        """
        stem = _stem(base)
        if directory not in self._stems:
            self._stems[directory] = _image_files(directory)
        others = self._stems[directory].get(stem, [])
        same_kind = [other for other in others if _composed(other).lower() == _composed(base).lower()]
        if len(same_kind) == 1 or len(others) == 1:
            return (same_kind or others)[0]
        if others:
            shown = listed([printable(other, 80) for other in sorted(others)], _NUM_NAMED)
            self._missing[name] = f"{where}; there is {shown}: name one of them"
        return None


def _stem(base: str) -> str:
    """Return a file name without the extension of an image, in the one form of Unicode."""
    base = _composed(base)
    stem, suffix = os.path.splitext(base)  # noqa: PTH122 - strings: once for every file
    return stem if suffix.lower() in IMAGE_SUFFIXES else base


def _composed(name: str) -> str:
    """Return a name with accents composed: macOS and its archives write letter and accent apart."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _image_files(directory: str) -> dict[str, list[str]]:
    """List the image files of a directory by their names without extension; empty if it cannot be read."""
    files: dict[str, list[str]] = {}
    for name in _names_in(directory):
        if (stem := _stem(name)) != _composed(name):
            files.setdefault(stem, []).append(name)
    return files


def _names_in(directory: str) -> list[str]:
    """Return the names in a directory; none if it cannot be read."""
    try:
        return os.listdir(directory)  # noqa: PTH208 - strings: once for every file
    except OSError:
        return []
