"""Locate images inside the Arrow files of a dataset's cache, so that they are read only when needed.

Read through a table's memory map, every image would count as memory of the process from then on.
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
    """A range of bytes in a file."""

    path: Path
    offset: int
    length: int

    def read(self) -> bytes:
        """Read the bytes; OSError if the file is gone or has become shorter."""
        with self.path.open("rb") as handle:
            handle.seek(self.offset)
            data = handle.read(self.length)
        if len(data) < self.length:
            raise OSError(None, "the dataset's cache was cut short")
        return data


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
    # A selection of rows that is not contiguous is stored as indices next to the table.
    if table._indices is not None:
        yield from (row[column] for row in table.select_columns(column))
        return
    for chunk in table.data.column(column).chunks:
        yield from _of_array(chunk, mappings)


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
