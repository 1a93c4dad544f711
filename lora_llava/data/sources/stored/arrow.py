"""Locate images inside the Arrow files of a dataset's cache, so that they are read only when needed.

Read through a table's memory map, every image would count as memory of the process from then on.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_llava.data.sources.stored.ranges import StoredBytes
from lora_llava.system.files import staged_file

_MAPPED = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \d+ +(/.*)$", re.MULTILINE)
_MAPS = Path("/proc/self/maps")
_DIGEST = re.compile(r"^(\d+) (\d+) ([0-9a-f]{64})$")


class Digests:
    """The sha256 of stored bytes, remembered in a file next to the cache: all bytes are read only once.

    They hold as long as size and modification time of the cache file stay the same.
    """

    def __init__(self) -> None:
        self._known: dict[Path, dict[tuple[int, int], str]] = {}
        self._changed: set[Path] = set()

    def of(self, stored: StoredBytes) -> str:
        """Return the sha256 (hexadecimal) of stored bytes; OSError if they cannot be read."""
        if stored.digest:
            return stored.digest
        if stored.path not in self._known:
            self._known[stored.path] = _remembered(stored.path)
        known, span = self._known[stored.path], (stored.offset, stored.length)
        if span not in known:
            known[span] = hashlib.sha256(stored.read()).hexdigest()
            self._changed.add(stored.path)
        return known[span]

    def remember(self) -> None:
        """Write what is new; a cache that cannot be written to is left alone."""
        for path in self._changed:
            lines = (f"{start} {length} {digest}\n" for (start, length), digest in self._known[path].items())
            with suppress(OSError), staged_file(_digests_of(path)) as staging:
                staging.write_text(_state(path) + "".join(lines), encoding="ascii")
        self._changed.clear()


def _digests_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _state(path: Path) -> str:
    """Return the first line of the file with the digests of `path`."""
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}\n"


def _remembered(path: Path) -> dict[tuple[int, int], str]:
    """Read the digests of a cache file; empty if there are none, or the file has changed since."""
    try:
        lines = _digests_of(path).read_text(encoding="ascii").splitlines(keepends=True)
        if not lines or lines[0] != _state(path):
            return {}
    except (OSError, ValueError):
        return {}
    matches = [_DIGEST.match(line) for line in lines[1:]]
    return {(int(match[1]), int(match[2])): match[3] for match in matches if match is not None}


class _Mapping(NamedTuple):
    """A part of a file that is mapped into this process."""

    start: int
    end: int
    offset: int
    path: Path


def image_cells(table: Any, column: str) -> Iterator[Any]:
    """Yield the cells of a column of undecoded images, or lists of images, with StoredBytes instead of bytes.

    `table` is a `datasets.Dataset` over memory-mapped files. Where the file is unknown (tables in memory, systems
    other than Linux), the cells hold the bytes themselves.
    """
    mappings = _mappings()
    cells = (cell for chunk in table.data.column(column).chunks for cell in _of_array(chunk, mappings))
    # A selection of rows that is not contiguous is stored as indices next to the table.
    if table._indices is None:
        yield from cells
    else:
        located = list(cells)
        yield from (located[index] for index in table._indices.column(0).to_pylist())


def _mappings() -> list[_Mapping]:
    if not _MAPS.exists():
        return []
    matches = _MAPPED.finditer(_MAPS.read_text(encoding="utf-8", errors="replace"))
    return sorted(
        _Mapping(int(match[1], 16), int(match[2], 16), int(match[3], 16), Path(match[4])) for match in matches
    )


def _of_array(array: Any, mappings: list[_Mapping]) -> Iterator[Any]:
    import pyarrow as pa

    if not pa.types.is_struct(array.type):
        # Lists: their values are one array, split by offsets.
        values = list(_of_array(array.values, mappings))
        bounds = array.offsets.to_pylist()
        for start, end, is_valid in zip(bounds[:-1], bounds[1:], array.is_valid().to_pylist(), strict=True):
            yield values[start:end] if is_valid else None
        return
    stored = _locate(array.field("bytes"), mappings)
    paths = array.field("path").to_pylist()
    for data, path, is_valid in zip(stored, paths, array.is_valid().to_pylist(), strict=True):
        yield {"bytes": data, "path": path} if is_valid else None


def _locate(array: Any, mappings: list[_Mapping]) -> Iterator[StoredBytes | bytes | None]:
    """Yield the location of each value of a binary array, or the value if its file is unknown."""
    import pyarrow as pa

    _, offsets, data = array.buffers()
    mapping = None if data is None else _mapping_of(data.address, data.size, mappings)
    if mapping is None:
        yield from (value.as_py() for value in array)
        return
    kind = np.int64 if pa.types.is_large_binary(array.type) else np.int32
    bounds = np.frombuffer(offsets, dtype=kind)[array.offset : array.offset + len(array) + 1].tolist()
    first = data.address - mapping.start + mapping.offset
    for start, end, is_valid in zip(bounds[:-1], bounds[1:], array.is_valid().to_pylist(), strict=True):
        yield StoredBytes(mapping.path, first + start, end - start) if is_valid else None


def _mapping_of(address: int, size: int, mappings: list[_Mapping]) -> _Mapping | None:
    """Return the mapping of an Arrow file that contains a whole buffer; None if there is none."""
    index = bisect_right(mappings, address, key=lambda mapping: mapping.start) - 1
    if index < 0 or address + size > mappings[index].end or mappings[index].path.suffix != ".arrow":
        return None
    return mappings[index]
