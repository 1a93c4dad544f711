"""Find where the images of a table are: their root, and the template that makes paths of its columns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
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
    equal: tuple[Path, ...] = ()
    """Other roots under which as many paths exist; names alone do not say which is right."""


def find_images(rows: Sequence[Mapping[str, Any]], column: str, others: Sequence[str], directory: Path) -> ImagePaths:
    """Return the root and setting under which most images of the sampled rows exist.

    `others`: columns that may name the folder of an image, such as its class. They decide if several folders have
    images of the same names.
    """
    rows = [row for row in rows if isinstance(row.get(column), str) and row[column]]
    roots = list(_roots(directory))
    names = {root.name for root in roots}
    # Each column tried costs a look for every row in every root, so only those that name a folder are.
    folders = [other for other in others if any(str(row.get(other)).split("/")[0] in names for row in rows)]
    best = _best_paths(rows, column, "", roots)
    for folder in folders:
        if best.share == 1.0 and not best.equal:
            break
        paths = _best_paths(rows, column, folder, roots)
        if paths.share > best.share or (best.equal and not paths.equal and paths.share == best.share):
            best = paths
    return best


def _best_paths(rows: Sequence[Mapping[str, Any]], column: str, folder: str, roots: Sequence[Path]) -> ImagePaths:
    """Return the root and suffix under which most images exist, with one column, or none, for the folder."""
    best = ImagePaths(roots[0], column, 0.0)
    for suffix in _SUFFIXES:
        names = [name for row in rows if (name := _name(row, column, folder, suffix)) is not None]
        for root in roots if names else ():
            share = sum((root / name).is_file() for name in names) / len(rows)
            if share > best.share:
                best = ImagePaths(root, _setting(column, folder, suffix), share)
            elif share == best.share > 0.0 and best.setting == _setting(column, folder, suffix):
                best = best._replace(equal=(*best.equal, root))
        if best.share == 1.0:
            break
    return best


def _name(row: Mapping[str, Any], column: str, folder: str, suffix: str) -> str | None:
    """Return the path that a template makes of a row; None if it would leave the root."""
    above = "" if not folder else row.get(folder)
    name = f"{above}/{row[column]}{suffix}" if above else f"{row[column]}{suffix}"
    # As ImageRoot reads paths of Windows.
    name = name.replace("\\", "/")
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
