"""Read the fields of foreign files: each of the expected type, or an error that names file, record and field."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_llava.data.record import check_text
from lora_llava.data.sources.cells import kind_of
from lora_llava.errors import DataError
from lora_llava.system.text import listed, printable

_MAX_ID = 200
"""Longest id in characters."""


class DropError(DataError):
    """A record, image or annotation cannot be converted and is left out."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
        """Why, in words that the report groups by."""


WRONG_FIELD = "a field is missing or of the wrong type"


def input_file(source: Path, pattern: str) -> Path:
    """Return `source` if it is a file, else the only file in it that matches `pattern`; DataError if there is none."""
    if not source.is_dir():
        if not source.is_file():
            raise DataError(f"{source}: there is no such file or directory; correct SRC")
        return source
    matches = sorted(path for path in source.glob(pattern) if path.is_file())
    if len(matches) == 1:
        return matches[0]
    names = listed([printable(path.name) for path in matches])
    got = f"holds {len(matches)} files {pattern} ({names})" if matches else f"holds no file {pattern}"
    raise DataError(f"{source}: {got}; name the file as SRC, and the directory of its images with --images")


def images_near(path: Path) -> Path:
    """Return the directory `images` next to an annotation file, or the directory of the file if there is none."""
    images = path.parent / "images"
    return images if images.is_dir() else path.parent


def is_split(name: str) -> bool:
    """Tell whether the name of a split can be the name of a file."""
    return re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name) is not None


def mapping(value: Any, where: str) -> dict[str, Any]:
    """Return `value` if it is an object; DropError otherwise."""
    if isinstance(value, dict):
        return value
    raise DropError(f"{where}: {_got(value)}, must be an object", WRONG_FIELD)


def items(document: Any, key: str, where: str) -> list[Any]:
    """Return the list under a key of a document; DataError if there is none."""
    if not isinstance(document, dict):
        raise DataError(f"{where}: holds {kind_of(document)}, must hold an object with {key}; correct SRC")
    value = document.get(key)
    if isinstance(value, list):
        return value
    got = "is missing" if value is None else f"is {kind_of(value)}"
    raise DataError(f"{where}: {key}: {got}, must be a list; the file has {listed(_keys(document))}")


def _keys(document: dict[str, Any]) -> list[str]:
    return [printable(key, 40) for key in document] or ["no keys"]


def numbered(values: list[Any], where: str) -> Iterator[tuple[str, Any]]:
    """Yield every element of a list with its name for messages."""
    for index, value in enumerate(values):
        yield f"{where}[{index}]", value


def text(entry: dict[str, Any], key: str, where: str) -> str:
    """Return a text that is not blank, without white space around it; DropError for anything else."""
    value = entry.get(key)
    if not isinstance(value, str):
        raise DropError(f"{where}: {key}: {_got(value)}, must be text", WRONG_FIELD)
    if not value.strip():
        raise DropError(f"{where}: {key}: is empty", "a text is empty")
    return check_text(value, f"{where}: {key}").strip()


def identity(entry: dict[str, Any], key: str, where: str) -> str:
    """Return an id, a string or an integer, as text; DropError for anything else."""
    value = entry.get(key)
    if value == "":
        raise DropError(f"{where}: {key}: is empty, must be a string or an integer", WRONG_FIELD)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DropError(f"{where}: {key}: {_got(value)}, must be a string or an integer", WRONG_FIELD)
    if isinstance(value, int) and value.bit_length() > 64:
        raise DropError(f"{where}: {key}: is a number of {value.bit_length():,} bits, no id", WRONG_FIELD)
    if len(name := check_text(str(value), f"{where}: {key}")) > _MAX_ID:
        raise DropError(f"{where}: {key}: has {len(name):,} characters, no id", WRONG_FIELD)
    return name


def number(entry: dict[str, Any], key: str, where: str) -> float:
    """Return a finite number; DropError for anything else."""
    return finite(entry.get(key), f"{where}: {key}")


def finite(value: Any, where: str) -> float:
    """Return `value` as a float if it is a finite number; DropError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DropError(f"{where}: {_got(value)}, must be a number", WRONG_FIELD)
    # An integer of JSON can be larger than any float.
    if (isinstance(value, int) and value.bit_length() > 64) or not math.isfinite(value):
        raise DropError(f"{where}: is no number of pixels", WRONG_FIELD)
    return float(value)


def _got(value: Any) -> str:
    return "is missing" if value is None else f"is {kind_of(value)}"
