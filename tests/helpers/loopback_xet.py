"""The Hub's store of large files, Xet, as `hf_xet` uploads to it: blocks of chunks, and lists of files made of them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

TOKEN = "xet-token-of-one-upload"
SETTINGS = {"HF_XET_XORB_COMPRESSION_POLICY": "none"}
"""Settings of `hf_xet` under which `files_in` can read its blocks."""
_ENTRY = 48
"""Bytes of each entry in a list of files; its header is as long."""
_END = b"\xff" * 32
_HAS_PROOFS, _HAS_SHA256 = 1 << 31, 1 << 30


def hex_name(raw: bytes) -> str:
    """Write a hash of 32 bytes as Xet does in addresses: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def chunks_of(block: bytes) -> list[bytes]:
    """Cut a block into its chunks; each has a header with the length as stored, the compression, and the length."""
    chunks, at = [], 0
    while at + 8 <= len(block) and block[at] == 0:
        stored = int.from_bytes(block[at + 1 : at + 4], "little")
        assert block[at + 4] == 0, "a compressed chunk"
        chunks.append(block[at + 8 : at + 8 + stored])
        at += 8 + stored
    return chunks


def files_in(listing: bytes, blocks: Mapping[str, bytes]) -> Iterator[bytes]:
    """Yield the content of every file in a list, from the blocks that it names."""
    at = _ENTRY
    while (name := listing[at : at + 32]) != _END:
        assert len(name) == 32
        flags, count = struct.unpack_from("<2I", listing, at + 32)
        content = b""
        for number in range(count):
            part = at + _ENTRY * (1 + number)
            _, _, first, last = struct.unpack_from("<4I", listing, part + 32)
            content += b"".join(chunks_of(blocks[hex_name(listing[part : part + 32])])[first:last])
        yield content
        at += _ENTRY * (1 + count + (count if flags & _HAS_PROOFS else 0) + (1 if flags & _HAS_SHA256 else 0))
