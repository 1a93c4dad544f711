"""Check a local dataset before the `datasets` library reads it: it may name files elsewhere, or unpack without end."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from lora_llava.data.images.root import IMAGE_SUFFIXES
from lora_llava.data.sources.files.shards import check_shard
from lora_llava.errors import DataError
from lora_llava.system.text import printable

_CARDS = ("README.md", ".huggingface.yaml")
"""Files of a dataset that tell `datasets` which files to read."""
_MAX_CARD_BYTES = 2**20
_ELSEWHERE = re.compile(r"^[/\\~]|^[A-Za-z]:|://|::|(?:^|[/\\])\.\.(?:[/\\]|$)")
"""Matches a path that leaves its directory, a URL, and a chain of file systems."""
_HARMLESS_BYTES, _MAX_RATIO = 256 * 2**20, 50
"""Unpacked bytes that are always allowed, and above them the largest multiple of the packed ones; text has up to 20."""
_STREAMS: dict[str, Any] = {".gz": gzip.GzipFile, ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile}
_DAMAGED = (zipfile.BadZipFile, lzma.LZMAError, zlib.error, struct.error)
_CHUNK = 2**20
_ZIP = ".zip"
_FIRST_BYTES = {
    b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"PK\3\4": _ZIP, b"7z\xbc\xaf\x27\x1c": ".7z",
    b"Rar!\x1a\x07": ".rar", b"\x28\xb5\x2f\xfd": ".zst", b"\x04\x22\x4d\x18": ".lz4",
}  # fmt: skip
"""By these `datasets` knows a file to unpack, whatever its name. Source: `datasets/utils/extract.py`."""
_UNBOUNDED = (".7z", ".rar", ".zst", ".lz4")
"""Kinds of archives whose unpacked size cannot be read or counted without packages that the kit does not need."""


def check_directory(directory: Path) -> None:
    """Raise DataError if a directory names files outside of it, or holds an archive that unpacks without bounds."""
    for name in _CARDS:
        for pattern in _patterns(directory / name):
            if _ELSEWHERE.search(pattern):
                raise DataError(
                    f"{directory / name}: data_files names {printable(pattern, 80)!r}, outside of the directory, which "
                    "is not read; name files in it, or remove data_files"
                )
    for folder, _, names in os.walk(directory):
        for name in names:
            if name.endswith(".tar"):
                check_shard(Path(folder, name))
            # `datasets` does not unpack images, of which there may be very many.
            if not name.lower().endswith(IMAGE_SUFFIXES) and (kind := _archive_kind(path := Path(folder, name))):
                _check_archive(path, kind)


def check_files(files: Any, directory: Path) -> None:
    """Raise DataError if one of the files that `datasets` chose, by split, lies outside of the directory."""
    inside = os.path.join(directory.resolve(), "")  # noqa: PTH118 - with its separator
    for names in (files or {}).values():
        for name in names:
            # Without following links: those that the user made to another disk work.
            if not os.path.normpath(str(name)).startswith(inside):
                raise DataError(
                    f"{directory}: {printable(str(name), 500)} is outside of the directory, and is not read; copy the "
                    "file into it"
                )


def _patterns(card: Path) -> Iterator[str]:
    """Yield the texts below `data_files` and `data_dir` in the metadata of a dataset."""
    if not card.exists():
        return
    if not card.is_file() or card.stat().st_size > _MAX_CARD_BYTES:
        raise DataError(f"{card} is not a regular file of at most {_MAX_CARD_BYTES:,} bytes; remove it")
    text = card.read_text(encoding="utf-8", errors="replace")
    if card.suffix == ".md":
        header = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, re.DOTALL)
        text = header[1] if header else ""
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{card}: its metadata is not valid YAML; correct it, or remove the file") from error
    yield from _below(content, named=False, seen=set())


def _below(value: Any, *, named: bool, seen: set[int]) -> Iterator[str]:
    if isinstance(value, str):
        yield from [value] if named else []
    elif isinstance(value, dict | list) and id(value) not in seen:
        # An alias of YAML can stand for one value many times, or contain itself.
        seen.add(id(value))
        items = value.items() if isinstance(value, dict) else ((None, item) for item in value)
        for key, item in items:
            yield from _below(item, named=named or key in ("data_files", "data_dir"), seen=seen)


def _archive_kind(path: Path) -> str | None:
    """Return the extension of the kind of archive that a file is, by its content or its name; None if it is none."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is not a regular file; remove it")
    with suppress(OSError):
        with path.open("rb") as file:
            start = file.read(8)
        if kind := next((kind for first, kind in _FIRST_BYTES.items() if start.startswith(first)), None):
            return kind
        if zipfile.is_zipfile(path):
            return _ZIP
    return path.suffix if path.suffix in {*_STREAMS, *_FIRST_BYTES.values()} else None


def _check_archive(path: Path, kind: str) -> None:
    """Raise DataError for an archive that is damaged, or unpacks to a large multiple of its size, or may do so."""
    if kind in _UNBOUNDED:
        raise DataError(
            f"{path} is a {kind} archive, which could unpack without end; unpack it yourself if you trust it, and "
            "remove it"
        )
    most = max(_HARMLESS_BYTES, _MAX_RATIO * path.stat().st_size)
    try:
        unpacked = _unpacked_bytes(path, kind, most)
    except (OSError, EOFError, ValueError, RuntimeError, *_DAMAGED) as error:
        raise DataError(f"{path} is damaged; download it again") from error
    if unpacked > most:
        raise DataError(
            f"{path} unpacks to more than {most / 2**20:,.0f} MiB, far more than data of its size; unpack it yourself "
            "if you trust it"
        )


def _unpacked_bytes(path: Path, kind: str, most: int) -> int:
    """Return the unpacked size of an archive; of a stream it is counted, up to the first chunk above `most`."""
    if kind == _ZIP:
        with zipfile.ZipFile(path) as archive:
            return sum(member.file_size for member in archive.infolist())
    total = 0
    with _STREAMS[kind](path) as stream:
        while total <= most and (chunk := stream.read(_CHUNK)):
            total += len(chunk)
    return total
