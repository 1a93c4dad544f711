"""Cells of embedded images as the cache of `datasets` holds them: where the bytes are, relative to a directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lora_llava.data.sources.stored.ranges import Packing, StoredBytes
from lora_llava.errors import DataError
from lora_llava.system.text import printable

CACHE = "lora_llava"
"""Directory in the cache of `datasets`: other programs would take these cells for images."""
LOCATION = {
    "file": "string", "codec": "string", "start": "int64", "span": "int64", "size": "int64", "skip": "int64",
    "length": "int64", "sha256": "string", "path": "string",
}  # fmt: skip
"""Fields of a cell, with the names of their types in `datasets`."""


def location_root(data: Path) -> Path:
    """Return the directory that the files of a data set are in: of one of the Hub, the cache of downloads."""
    if data.exists():
        return data if data.is_dir() else data.parent
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def is_location(feature: Any) -> bool:
    """Tell whether a feature of `datasets` is that of such cells, or of lists of them."""
    if isinstance(feature, list):
        feature = feature[0] if feature else None
    elif not isinstance(feature, dict):
        feature = getattr(feature, "feature", None)
    return isinstance(feature, dict) and feature.keys() == LOCATION.keys()


def to_row(stored: StoredBytes | None, file: str, path: str | None) -> dict[str, Any] | None:
    """Return a cell with the location of bytes in `file`, and their name in the data."""
    if stored is None:
        # An image of which the data have the path alone.
        return None if path is None else dict.fromkeys(LOCATION) | {"path": path}
    packing = stored.packing or Packing("", stored.length, stored.length, 0)
    values = (file, packing.codec, stored.offset, *packing[1:], stored.length, stored.digest, path)
    return dict(zip(LOCATION, values, strict=True))


def from_row(row: Any, root: Path) -> Any:
    """Return a cell as other sources have it: a mapping of `bytes` and `path`, a list of these, or None.

    Raises DataError if it names a file outside of `root`.
    """
    if isinstance(row, list):
        return [from_row(value, root) for value in row]
    if row is None or (row["file"] is None and row["path"] is None):
        return None
    return {"bytes": None if row["file"] is None else _stored(row, root), "path": row["path"]}


def _stored(row: dict[str, Any], root: Path) -> StoredBytes:
    file = row["file"]
    # Without following links: those that the user made to another disk work.
    if os.path.isabs(file) or os.path.normpath(file).startswith(".."):  # noqa: PTH117 - strings: once for every image
        raise DataError(f"the cache names {printable(file, 200)!r}, outside of {root}, which is not read; remove it")
    packing = None if not row["codec"] else Packing(row["codec"], row["span"], row["size"], row["skip"])
    return StoredBytes(root / file, row["start"], row["length"], packing, row["sha256"])
