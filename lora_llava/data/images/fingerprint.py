"""What the image files of records were, told cheaply: enough to see, later, that one of them is another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_llava.data.record import Record

MAX_HASHED = 128 * 2**20
"""Bytes of all image files up to which their content is hashed; beyond, size and time of change must do."""


def picture_facts(records: Iterable[Record]) -> dict[str, Any]:
    """Describe the image files that records show: how many, their bytes, and hashes of sizes, times and content.

    Images inside a data set are known by their content already, through the keys of the records.
    """
    files: dict[str, Path] = {
        record.image.key: record.image.path
        for record in records
        if record.image is not None and record.image.path is not None and record.image.data is None
    }
    names = sorted(files)
    found = {name: _stat(files[name]) for name in names}
    total = sum(size for size, _ in found.values())
    return {
        "files": len(names),
        "bytes": total,
        "sizes": _digest(f"{name}\0{found[name][0]}" for name in names),
        "times": _digest(f"{name}\0{found[name][1]}" for name in names),
        "content": _digest(f"{name}\0{_content(files[name])}" for name in names) if total <= MAX_HASHED else None,
    }


def same_pictures(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Tell whether two descriptions are of the same image files; of copies with other times the content decides."""
    if before["sizes"] != now["sizes"]:
        return False
    if before["content"] and now["content"]:
        return bool(before["content"] == now["content"])
    return bool(before["times"] == now["times"])


def _stat(path: Path) -> tuple[int, int]:
    """Return size and time of change; zeros for a file that is gone: opening it will say so."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _content(path: Path) -> str:
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
