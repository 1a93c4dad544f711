"""A cheap fingerprint of the image files of records, to detect later that a file changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_llava.data.record import Record

_MAX_HASHED_BYTES = 128 * 2**20
"""Hash the content of image files up to this total size; above it, compare sizes and modification times."""


def picture_facts(records: Iterable[Record]) -> dict[str, Any]:
    """Return the number of image files of the records, their total bytes, and hashes of sizes, times and content.

    Embedded images are left out: the keys of the records are hashes of their content.
    """
    files: dict[str, Path] = {
        record.image.key: record.image.path
        for record in records
        if record.image is not None and record.image.path is not None and record.image.data is None
    }
    names = sorted(files)
    stats = {name: _stat(files[name]) for name in names}
    total = sum(size for size, _ in stats.values())
    return {
        "files": len(names),
        "bytes": total,
        "sizes": _digest(f"{name}\0{stats[name][0]}" for name in names),
        "times": _digest(f"{name}\0{stats[name][1]}" for name in names),
        "content": _digest(f"{name}\0{_hash(files[name])}" for name in names) if total <= _MAX_HASHED_BYTES else None,
    }


def same_pictures(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return whether two fingerprints are of the same image files; the content decides if only the times differ."""
    if before["sizes"] != now["sizes"]:
        return False
    if before["content"] and now["content"]:
        return bool(before["content"] == now["content"])
    return bool(before["times"] == now["times"])


def _stat(path: Path) -> tuple[int, int]:
    """Return size and modification time; zeros for a missing file, which is reported when it is opened."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError:
        return ""


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()
