"""Locate the values of a Parquet column of bytes, page by page, and hash them; a page is never held in memory.

Source: https://github.com/apache/parquet-format, `README.md` and `Encodings.md`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lora_llava.data.sources.stored.bodies import Body, open_body, varint
from lora_llava.data.sources.stored.page_headers import DATA, DATA_V2, DICTIONARY, PageHeader, read_page_header
from lora_llava.data.sources.stored.ranges import SNAPPY, STREAMS, StoredBytes

CODECS = {"UNCOMPRESSED": "", "SNAPPY": SNAPPY, **{name.upper(): name for name in STREAMS}}
"""Codecs that can be read, by their names in the metadata of a file."""
ENCODINGS = frozenset({"PLAIN", "PLAIN_DICTIONARY", "RLE_DICTIONARY", "RLE"})
_PLAIN, _IN_DICTIONARY = 0, (2, 8)
_CHUNK = 2**20
_MAX_WIDTH = 32

Cell = StoredBytes | None | list[StoredBytes | None]
Levels = npt.NDArray[np.int64]


class Column(NamedTuple):
    """What the schema says of a column of bytes."""

    leaf: int
    """Its number among the leaf columns of the file."""
    highest_repetition: int
    """1 for lists, 0 for others."""
    highest: int
    """Definition level of a value that is there."""
    is_nullable: bool
    """Whether its outermost level, of several, may be null."""


def locate_cells(path: Path, group: Any, column: Column) -> Iterator[Cell]:
    """Yield the cell of each row of a row group: where its bytes are, or a list of this.

    `group` has the metadata of the row group. Raises ValueError or OSError if the file is damaged.
    """
    entries = _entries(path, group.column(column.leaf), column)
    if not column.highest_repetition:
        yield from (stored for _, _, stored in entries)
        return
    # An empty list has a lower level than one with an element, even if that is null.
    has_element = 2 if column.is_nullable else 1
    cell: list[StoredBytes | None] | None = None
    is_first = True
    for repetition, definition, stored in entries:
        if repetition == 0:
            if not is_first:
                yield cell
            is_first = False
            cell = [] if definition >= has_element - 1 else None
        if definition >= has_element:
            if cell is None:
                raise ValueError("a list begins within a row")
            cell.append(stored)
    if not is_first:
        yield cell


def _entries(path: Path, chunk: Any, column: Column) -> Iterator[tuple[int, int, StoredBytes | None]]:
    """Yield repetition level, definition level and location of each entry of a column chunk."""
    start, codec, left = chunk.data_page_offset, CODECS[chunk.compression], chunk.num_values
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
        start = chunk.dictionary_page_offset
    end = start + chunk.total_compressed_size
    dictionary: list[StoredBytes] = []
    with path.open("rb") as file:
        while left > 0:
            header = read_page_header(file.fileno(), start, end)
            start = header.start + header.span
            if header.kind == DICTIONARY:
                body = open_body(path, codec, header.start, header.span, header.size)
                dictionary = list(_values(body, header.num_values))
            elif header.kind in (DATA, DATA_V2):
                yield from _of_page(path, codec, header, column, dictionary)
                left -= header.num_values
                if not header.num_values:
                    raise ValueError("a page has no values")


def _of_page(
    path: Path, codec: str, header: PageHeader, column: Column, dictionary: list[StoredBytes]
) -> Iterator[tuple[int, int, StoredBytes | None]]:
    levels = header.level_bytes
    codec = codec if header.is_compressed else ""
    body = open_body(path, codec, header.start + levels, header.span - levels, header.size - levels)
    repetitions, definitions = _levels(path, header, column, body)
    count = int((definitions == column.highest).sum())
    if header.encoding == _PLAIN:
        values = _values(body, count)
    elif header.encoding in _IN_DICTIONARY:
        data = body.read(body.size - body.position)
        values = (dictionary[index] for index in _hybrid(data[1:], count, data[0] if data else 0).tolist())
    else:
        raise ValueError(f"a page has encoding {header.encoding}")
    for repetition, definition in zip(repetitions.tolist(), definitions.tolist(), strict=True):
        yield repetition, definition, next(values) if definition == column.highest else None


def _levels(path: Path, header: PageHeader, column: Column, body: Body) -> tuple[Levels, Levels]:
    """Return the repetition and definition levels of the entries of a page."""
    count, highest = header.num_values, (column.highest_repetition, column.highest)
    if header.kind == DATA:
        data = [body.read(int.from_bytes(body.read(4), "little")) if level else b"" for level in highest]
    else:
        together = open_body(path, "", header.start, header.level_bytes, header.level_bytes).read(header.level_bytes)
        data = [together[: header.repetition_bytes], together[header.repetition_bytes :]]
    first, second = (_hybrid(part, count, level.bit_length()) for part, level in zip(data, highest, strict=True))
    return first, second


def _values(body: Body, count: int) -> Iterator[StoredBytes]:
    """Yield the locations of `count` values in plain encoding: each follows its length."""
    for _ in range(count):
        length = int.from_bytes(body.read(4), "little")
        if length > body.size - body.position:
            raise ValueError("a value is longer than its page")
        stored = body.locate(body.position, length)
        digest, left = hashlib.sha256(), length
        while left:
            data = body.read(min(left, _CHUNK))
            digest.update(data)
            left -= len(data)
        yield replace(stored, digest=digest.hexdigest())


def _hybrid(data: bytes, count: int, width: int) -> Levels:
    """Decode `count` numbers of `width` bits: runs of equal ones, and groups of eight packed ones."""
    if width > _MAX_WIDTH:
        raise ValueError(f"indices have {width} bits")
    values = np.zeros(count, dtype=np.int64)
    position = filled = 0
    while filled < count and width:
        header, position = varint(data, position)
        if header & 1:
            packed = data[position : position + (header >> 1) * width]
            position += len(packed)
            bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
            run = min(len(bits) // width, count - filled)
            values[filled : filled + run] = bits[: run * width].reshape(run, width) @ (1 << np.arange(width))
        else:
            size = (width + 7) // 8
            run = min(header >> 1, count - filled)
            values[filled : filled + run] = int.from_bytes(data[position : position + size], "little")
            position += size
        if not run:
            raise ValueError("levels or indices are cut short")
        filled += run
    return values
