"""Find where the images of a table are: their root, and the template that makes paths of its columns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

_MAX_ROOTS = 200
"""Maximum number of directories that are tried."""
_SUFFIXES = ("", ".png", ".jpg", ".jpeg", ".tif")
"""What is appended to names without an extension."""


class ImagePaths(NamedTuple):
    """How the paths of a column lead to images."""

    root: Path
    setting: str
    """`columns.image`: the column, or a template of it."""
    share: float
    """Share of the sampled paths that exist."""


def find_images(rows: Sequence[Mapping[str, Any]], column: str, others: Sequence[str], directory: Path) -> ImagePaths:
    """Return the root and setting under which most images of the sampled rows exist.

    `others`: columns that may name the folder of an image, such as its class.
    """
    rows = [row for row in rows if isinstance(row.get(column), str) and row[column]]
    best = ImagePaths(directory, column, 0.0)
    for (folder, suffix), root in product(product(("", *others), _SUFFIXES), _roots(directory)):
        names = [_name(row, column, folder, suffix) for row in rows]
        found = sum((root / name).is_file() for name in names if name is not None)
        if found > best.share * len(rows):
            best = ImagePaths(root, _setting(column, folder, suffix), found / len(rows))
        if best.share == 1.0:
            break
    return best


def _name(row: Mapping[str, Any], column: str, folder: str, suffix: str) -> str | None:
    """Return the path that a template makes of a row; None if it would leave the root."""
    above = "" if not folder else row.get(folder)
    name = f"{above}/{row[column]}{suffix}" if above else f"{row[column]}{suffix}"
    is_path = isinstance(above, str) and len(name) < 1_000 and "\0" not in name and ".." not in name.split("/")
    return name if is_path and name.isprintable() else None


def _setting(column: str, folder: str, suffix: str) -> str:
    if not folder and not suffix:
        return column
    return f"{{{folder}}}/{{{column}}}{suffix}" if folder else f"{{{column}}}{suffix}"


def _roots(directory: Path) -> Iterator[Path]:
    """Yield the directory, and those below it by their depth; links to directories are not followed."""
    level, number = [directory], 0
    while level and number < _MAX_ROOTS:
        for root in level:
            yield root
            number += 1
        below: list[Path] = []
        for root in level:
            with os.scandir(root) as entries:
                names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
            below += [root / name for name in names if not name.startswith(".")]
        level = below[: _MAX_ROOTS - number]
