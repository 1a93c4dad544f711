"""Images inside the Arrow files of a data set's cache: found by their place in the file, read when they are needed.

A table's memory map would count every image that was ever looked at as memory of the process.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_MAPPED = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \d+ +(/.*)$", re.MULTILINE)
_MAPS = Path("/proc/self/maps")


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """Bytes inside a file that holds more."""

    path: Path
    offset: int
    length: int

    def read(self) -> bytes:
        """Read them. Raises OSError if the file is gone, or no longer as long as it was."""
        with self.path.open("rb") as handle:
            handle.seek(self.offset)
            data = handle.read(self.length)
        if len(data) < self.length:
            raise OSError(None, "the data set's cache was cut short")
        return data


class _Mapping(NamedTuple):
    """A part of a file that this process has mapped."""

    start: int
    end: int
    offset: int
    path: Path


def image_cells(table: Any, column: str) -> Iterator[Any]:
    """Yield the cells of a column of undecoded images, lists of them included, with StoredBytes in place of bytes.

    `table` is a `datasets.Dataset` over memory-mapped files. Bytes whose file the system does not tell (other systems
    than Linux, tables in memory) come as they are.
    """
    mappings = _mappings()
    # What selected the rows stands beside the table, unless they follow each other.
    if table._indices is not None:
        yield from (row[column] for row in table.select_columns(column))
        return
    for chunk in table.data.column(column).chunks:
        yield from _of_array(chunk, mappings)


def _mappings() -> list[_Mapping]:
    if not _MAPS.exists():
        return []
    found = _MAPPED.finditer(_MAPS.read_text(encoding="utf-8", errors="replace"))
    return sorted(_Mapping(int(one[1], 16), int(one[2], 16), int(one[3], 16), Path(one[4])) for one in found)


def _of_array(array: Any, mappings: list[_Mapping]) -> Iterator[Any]:
    import pyarrow as pa

    if not pa.types.is_struct(array.type):
        # Lists: their values are one array, cut by offsets.
        values = list(_of_array(array.values, mappings))
        bounds = array.offsets.to_pylist()
        for start, end, is_valid in zip(bounds[:-1], bounds[1:], array.is_valid().to_pylist(), strict=True):
            yield values[start:end] if is_valid else None
        return
    stored = _places(array.field("bytes"), mappings)
    paths = array.field("path").to_pylist()
    for data, path, is_valid in zip(stored, paths, array.is_valid().to_pylist(), strict=True):
        yield {"bytes": data, "path": path} if is_valid else None


def _places(array: Any, mappings: list[_Mapping]) -> Iterator[StoredBytes | bytes | None]:
    """Yield the place of each value of a binary array."""
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
    """Find the mapped file that holds a buffer whole."""
    place = bisect_right(mappings, address, key=lambda one: one.start) - 1
    if place < 0 or address + size > mappings[place].end or mappings[place].path.suffix != ".arrow":
        return None
    return mappings[place]
