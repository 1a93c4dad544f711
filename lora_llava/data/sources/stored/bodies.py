"""Read what a Parquet page is decompressed to from its beginning, and say where in the file each part of it is."""

from __future__ import annotations

import io
from bisect import bisect_right
from pathlib import Path
from typing import Protocol

from lora_llava.data.sources.stored.ranges import (
    SNAPPY,
    ByteStream,
    Packing,
    StoredBytes,
    decompress_snappy,
    open_range,
)

_BLOCK = 2**16
"""Compressors of Snappy begin anew after this many bytes."""
_WINDOW = 2**12
_UNPACKED_AT_ONCE = 2**20
_CUT = "a page is cut short"


class Body(Protocol):
    """The decompressed bytes of a page."""

    size: int
    position: int

    def read(self, length: int) -> bytes:
        """Read exactly `length` bytes; ValueError if the page ends earlier."""

    def locate(self, position: int, length: int) -> StoredBytes:
        """Return where `length` bytes from a position of the page are stored."""


def open_body(path: Path, codec: str, start: int, span: int, size: int) -> Body:
    """Open `span` compressed bytes of a file, of decompressed `size`; `codec` is empty for bytes as they are."""
    if not codec:
        return _Uncompressed(path, start, span)
    if codec == SNAPPY:
        return _Snappy(path, start, span, size)
    return _Streamed(path, codec, start, span, size)


class _Uncompressed:
    def __init__(self, path: Path, start: int, size: int) -> None:
        self.size, self.position = size, 0
        self._path, self._start = path, start
        self._file = open_range(path, start, size)

    def read(self, length: int) -> bytes:
        self.position += length
        return _exactly(self._file.read(length), length)

    def locate(self, position: int, length: int) -> StoredBytes:
        return StoredBytes(self._path, self._start + position, length)


class _Streamed:
    def __init__(self, path: Path, codec: str, start: int, span: int, size: int) -> None:
        self.size, self.position = size, 0
        self._path, self._codec, self._start, self._span = path, codec, start, span
        self._stream = ByteStream(path, start, span, codec)

    def read(self, length: int) -> bytes:
        self.position += length
        return _exactly(self._stream.read(length), length)

    def locate(self, position: int, length: int) -> StoredBytes:
        packing = Packing(self._codec, self._span, self.size, position)
        return StoredBytes(self._path, self._start, length, packing)


class _Snappy:
    """Data of Snappy, which can be decompressed from any element that no later one reaches behind."""

    def __init__(self, path: Path, start: int, span: int, size: int) -> None:
        self.size, self.position = size, 0
        self._path, self._start = path, start
        self._file = open_range(path, start, span)
        self._restarts = _restarts(self._file, span, size)
        self._outputs = [output for _, output in self._restarts]
        self._unpacked, self._unpacked_at = b"", 0

    def read(self, length: int) -> bytes:
        if length > self.size - self.position:
            raise ValueError(_CUT)
        parts = []
        while length:
            parts.append(self._read_some(length))
            length -= len(parts[-1])
        return b"".join(parts)

    def _read_some(self, length: int) -> bytes:
        """Read at least one and up to `length` bytes."""
        skip = self.position - self._unpacked_at
        if skip >= len(self._unpacked):
            (start, begin), (stop, end) = self._blocks(self.position, min(length, _UNPACKED_AT_ONCE))
            self._file.seek(start)
            self._unpacked = decompress_snappy(self._file.read(stop - start) or b"", end - begin)
            self._unpacked_at = begin
            skip = self.position - begin
        data = self._unpacked[skip : skip + length]
        self.position += len(data)
        return data

    def locate(self, position: int, length: int) -> StoredBytes:
        (start, begin), (stop, end) = self._blocks(position, length)
        packing = Packing(SNAPPY, stop - start, end - begin, position - begin)
        return StoredBytes(self._path, self._start + start, length, packing)

    def _blocks(self, position: int, length: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the last restart before `length` bytes from a position, and the first one after them."""
        first = min(bisect_right(self._outputs, position) - 1, len(self._outputs) - 2)
        last = bisect_right(self._outputs, position + length - 1, first + 1, len(self._outputs) - 1)
        return self._restarts[first], self._restarts[last]


def _exactly(data: bytes | None, length: int) -> bytes:
    if data is None or len(data) != length:
        raise ValueError(_CUT)
    return data


def _restarts(file: io.RawIOBase, span: int, size: int) -> list[tuple[int, int]]:
    """Return where elements of Snappy begin that refer to nothing before, and how many bytes those before stand for.

    The last is the end. Raises ValueError if the data are damaged. Source: Snappy's `format_description.txt`.
    """
    window, base = _window(file, 0), 0
    stated, position = varint(window, 0)
    if stated != size:
        raise ValueError("a page differs in size from its header")
    output = 0
    restarts = [(position, 0)]
    while position < span:
        index = position - base
        if index + 5 > _WINDOW:
            window, base, index = _window(file, position), position, 0
        tag = window[index]
        kind, count = tag & 3, (tag >> 2) + 1
        if kind == 0:
            extra = max(0, count - 60)
            if extra:
                count = int.from_bytes(window[index + 1 : index + 1 + extra], "little") + 1
            position += 1 + extra + count
        else:
            if kind == 1:
                count, distance = 4 + (tag >> 2 & 7), tag >> 5 << 8 | window[index + 1]
            else:
                distance = int.from_bytes(window[index + 1 : index + 1 + 2 * kind - 2], "little")
            position += (2, 3, 5)[kind - 1]
            while len(restarts) > 1 and output - distance < restarts[-1][1]:
                restarts.pop()
        output += count
        if output - restarts[-1][1] >= _BLOCK:
            restarts.append((position, output))
    if position != span or output != size:
        raise ValueError("a page is damaged")
    if restarts[-1] != (position, output):
        restarts.append((position, output))
    return restarts


def _window(file: io.RawIOBase, position: int) -> bytes:
    file.seek(position)
    # Elements near the end may be shorter than the longest.
    return (file.read(_WINDOW) or b"") + bytes(5)


def varint(data: bytes, position: int) -> tuple[int, int]:
    """Return the number of at most five bytes at a position, and the position after it; ValueError if there is none."""
    value = 0
    for shift, byte in zip(range(0, 35, 7), data[position : position + 5], strict=False):
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError(_CUT)
