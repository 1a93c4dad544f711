"""Read the headers of Parquet pages, which are structs in Thrift's compact protocol.

Sources: https://github.com/apache/parquet-format, `parquet.thrift`, and Thrift's `thrift-compact-protocol.md`.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

DATA, DICTIONARY, DATA_V2 = 0, 2, 3
"""Types of pages."""
_READ_BYTES, _MAX_BYTES = 2**14, 2**24
"""Bytes that are read for a header at first, and at most: it may hold the smallest and largest value of the page."""
_MAX_DEPTH = 8
_DAMAGED = "a page header is damaged"
_MAX_VALUES = 10_000_000
"""Most values of a page: a run of a few bytes may stand for any number of them."""


class PageHeader(NamedTuple):
    """What the header of a page says, and where the page is."""

    kind: int
    start: int
    """Where the page's bytes after the header begin in the file."""
    span: int
    """Their number in the file."""
    size: int
    """Their number when they are decompressed."""
    num_values: int
    encoding: int
    level_bytes: int
    """Bytes of levels in front of a page of version 2, which are not compressed."""
    repetition_bytes: int
    is_compressed: bool


def read_page_header(file: int, position: int, end: int) -> PageHeader:
    """Read the header of a page at a position of an open file; ValueError if it is damaged, or leads beyond `end`."""
    size = _READ_BYTES
    while True:
        data = os.pread(file, min(size, end - position), position)
        try:
            reader = _Reader(data)
            fields = reader.struct()
            break
        except IndexError:
            if len(data) < size or size >= _MAX_BYTES:
                raise ValueError("a page header is cut short") from None
            size *= 8
    header = _page_header(fields, position + reader.position)
    if header.start + header.span > end:
        raise ValueError("a page leads out of its column")
    return header


def _page_header(fields: dict[int, Any], start: int) -> PageHeader:
    kind, size, span = (_number(fields.get(number)) for number in (1, 2, 3))
    own = fields.get({DATA: 5, DICTIONARY: 7, DATA_V2: 8}.get(kind, 0), {})
    num_values = encoding = levels = repetition = 0
    if not isinstance(own, dict):
        raise ValueError(_DAMAGED)
    if own:
        num_values, encoding = _number(own.get(1)), _number(own.get(4 if kind == DATA_V2 else 2))
        if kind == DATA_V2:
            repetition = _number(own.get(6, 0))
            levels = repetition + _number(own.get(5, 0))
    if num_values > _MAX_VALUES or levels > min(span, size):
        raise ValueError(_DAMAGED)
    return PageHeader(kind, start, span, size, num_values, encoding, levels, repetition, own.get(7) is not False)


def _number(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(_DAMAGED)
    return value


class _Reader:
    """Reads values of the compact protocol; IndexError at the end of the data."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Return the fields of a struct by their numbers."""
        if depth > _MAX_DEPTH:
            raise ValueError("a page header is nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            delta, kind = head >> 4, head & 15
            number = number + delta if delta else self._signed()
            # The type of a boolean is its value.
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (4, 5, 6):
            return self._signed()
        if kind in (1, 2, 3):
            return self._byte()
        if kind == 7:
            return self._bytes(8)
        if kind == 8:
            return self._bytes(self._varint())
        if kind in (9, 10):
            head = self._byte()
            size = head >> 4 if head >> 4 < 15 else self._varint()
            return [self._value(head & 15, depth + 1) for _ in range(size)]
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"a page header has a field of type {kind}")

    def _byte(self) -> int:
        self.position += 1
        return self.data[self.position - 1]

    def _bytes(self, length: int) -> bytes:
        self.position += length
        if self.position > len(self.data):
            raise IndexError
        return self.data[self.position - length : self.position]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a page header has a number of more than 10 bytes")

    def _signed(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
