"""Bytes that stay in a file, as they are or compressed, and are read when needed."""

from __future__ import annotations

import io
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

_CHUNK = 2**20
SNAPPY = "snappy"
STREAMS = ("zstd", "gzip", "brotli")
"""Codecs that are decompressed from the beginning of a range."""
_CHANGED = "its file was cut short, or has changed"


class Packing(NamedTuple):
    """How stored bytes are compressed."""

    codec: str
    """`snappy`, or a codec that is decompressed as a stream."""
    span: int
    """Compressed bytes, from the offset on."""
    size: int
    """Bytes that they are decompressed to."""
    skip: int
    """Decompressed bytes before those that are stored."""


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """A range of bytes in a file, or in what a range of the file is decompressed to."""

    path: Path
    offset: int
    """Where the range begins in the file; of compressed bytes, where its compressed range begins."""
    length: int
    packing: Packing | None = None
    digest: str = ""
    """Their sha256 (hexadecimal), if it is known."""

    def read(self) -> bytes:
        """Read the bytes; OSError if the file is gone, or has become shorter."""
        if self.packing is None:
            with self.path.open("rb") as file:
                return _whole(os.pread(file.fileno(), self.length, self.offset), self.length)
        data = _unpacked(self.path, self.offset, self.packing, self.length)
        return _whole(data, self.length)

    def open(self) -> BinaryIO:
        """Open the bytes as a file; of those that are not compressed, only the parts that are asked for are read."""
        if self.packing is not None:
            return io.BytesIO(self.read())
        return io.BufferedReader(open_range(self.path, self.offset, self.length))


def _whole(data: bytes, length: int) -> bytes:
    if len(data) < length:
        raise OSError(None, _CHANGED)
    return data


def open_range(path: Path, offset: int, length: int) -> io.RawIOBase:
    """Open a range of bytes in a file as a file; processes that are forked from this one read it independently."""
    return _FileRange(path, offset, length)


class _FileRange(io.RawIOBase):
    def __init__(self, path: Path, offset: int, length: int) -> None:
        super().__init__()
        self._offset, self._length, self._position = offset, length, 0
        self._file = path.open("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        left = max(0, min(len(view), self._length - self._position))
        # Without the position of the file, which a fork would share.
        data = os.pread(self._file.fileno(), left, self._offset + self._position)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


class ByteStream:
    """Decompresses a range of a file from its beginning; what was read is not kept. Raises OSError if it is damaged."""

    def __init__(self, path: Path, offset: int, span: int, codec: str) -> None:
        import pyarrow as pa

        self.position = 0
        """Number of bytes read."""
        self._stream = pa.CompressedInputStream(pa.PythonFile(open_range(path, offset, span), mode="r"), codec)

    def read(self, length: int) -> bytes:
        """Read up to `length` bytes."""
        data = bytes(self._stream.read(length))
        self.position += len(data)
        return data

    def skip_to(self, position: int) -> None:
        """Read up to a position, and drop what was read."""
        while self.position < position and self.read(min(position - self.position, _CHUNK)):
            pass


class _Latest(threading.local):
    """The stream that this thread read last: images of one page are often read in their order."""

    source: tuple[Path, int] | None = None
    stream: ByteStream | None = None


_latest = _Latest()


def _unpacked(path: Path, offset: int, packing: Packing, length: int) -> bytes:
    """Decompress `length` bytes, or what is there of them."""
    if packing.codec == SNAPPY:
        with path.open("rb") as file:
            data = decompress_snappy(os.pread(file.fileno(), packing.span, offset), packing.size)
        return data[packing.skip : packing.skip + length]
    stream = _latest.stream if _latest.source == (path, offset) else None
    if stream is None or stream.position > packing.skip:
        stream = ByteStream(path, offset, packing.span, packing.codec)
        _latest.source, _latest.stream = (path, offset), stream
    try:
        stream.skip_to(packing.skip)
        return stream.read(length)
    except BaseException:
        # It may have been left anywhere.
        _latest.source = _latest.stream = None
        raise


def decompress_snappy(elements: bytes, size: int) -> bytes:
    """Return the `size` bytes that elements of Snappy stand for; OSError if they are damaged."""
    import pyarrow as pa

    # Data of Snappy begin with their size as a varint.
    head, left = bytearray(), size
    while left > 127:
        head.append(left & 127 | 128)
        left >>= 7
    head.append(left)
    try:
        return bytes(pa.decompress(bytes(head) + elements, size, codec=SNAPPY, asbytes=True))
    except ValueError as error:
        raise OSError(None, _CHANGED) from error
