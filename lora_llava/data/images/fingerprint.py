"""A cheap fingerprint of the image files of records, to detect later that a file changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_llava.data.record import Record
from lora_llava.system.files import file_sha256

_MAX_HASHED_BYTES = 128 * 2**20
"""Hash the content of image files up to this total size; above it, compare sizes and modification times."""


def picture_facts(records: Iterable[Record]) -> dict[str, Any]:
    """Return the number of image files of the records, their total bytes, and hashes of sizes, times and content.

    Embedded images are left out: the keys of the records are hashes of their content.
    """
    # With the path: files below different image roots may have the same name.
    files = {
        (record.image.key, record.image.path)
        for record in records
        if record.image is not None and record.image.path is not None and record.image.data is None
    }
    stats = {path: _stat(path) for _, path in files}
    total = sum(stats[path][0] for _, path in files)
    return {
        "files": len(files),
        "bytes": total,
        "sizes": _digest(f"{name}\0{stats[path][0]}" for name, path in files),
        "times": _digest(f"{name}\0{stats[path][1]}" for name, path in files),
        "content": _digest(f"{name}\0{_hash(path)}" for name, path in files) if total <= _MAX_HASHED_BYTES else None,
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
        return file_sha256(path)
    except OSError:
        return ""


def _digest(lines: Iterable[str]) -> str:
    """Hash lines in sorted order, so that it matters neither where files are nor in which order they are used."""
    digest = hashlib.sha256()
    for line in sorted(lines):
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()
