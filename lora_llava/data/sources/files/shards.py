"""Find what is wrong with a tar shard, which libraries report without the name of the file or the record."""

from __future__ import annotations

import re
import tarfile
import zlib
from pathlib import Path

from lora_llava.errors import DataError
from lora_llava.system.progress import note
from lora_llava.system.text import first_line, printable

_BLOCK = 512
"""A tar archive consists of blocks of so many bytes; a shorter one was cut."""
_END = bytes(2 * _BLOCK)
_MAGIC, _MAGIC_AT = b"ustar", 257
_MEMBER = re.compile(r"((?:.*/)?[^.]+)\.[^/]*")
"""A member of a record: its key, up to the first dot of the file name, and the extension. Source: WebDataset."""
_CHUNK = 2**20
_FIX = "copy or download it again, or take it out"


def check_shard(path: Path) -> None:
    """Raise DataError if a tar file was cut in a header, which readers take for its end; note a missing end mark."""
    with path.open("rb") as file:
        is_tar = file.read(_MAGIC_AT + len(_MAGIC)).endswith(_MAGIC)
        size = path.stat().st_size
        file.seek(max(0, size - len(_END)))
        is_ended = file.read() == _END
    if is_tar and size % _BLOCK:
        raise _damage_of(path) or DataError(f"{path}: is cut short, in the middle of a block; {_FIX}")
    if is_tar and not is_ended:
        note(f"{path}: has no end mark; if it was cut short, records are missing")


def damaged_shard(directory: Path) -> DataError | None:
    """Return the error for the first damaged tar shard below a directory, naming file and record; None without one."""
    shards = (path for path in sorted(directory.rglob("*.tar*")) if path.is_file())
    return next((damage for path in shards if (damage := _damage_of(path)) is not None), None)


def _damage_of(path: Path) -> DataError | None:
    """Read a tar file to its end or to its first fault."""
    number, key, name = 0, "", ""
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                match = _MEMBER.fullmatch(member.name) if member.isreg() else None
                if match is None or (file := archive.extractfile(member)) is None:
                    continue
                number, key, name = number + (match[1] != key), match[1], member.name
                while file.read(_CHUNK):
                    pass
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        where = f"record {number:,} ({printable(name, 80)})" if number else "its first record"
        return DataError(f"{path}: is damaged or cut short at {where}: {printable(first_line(error))}; {_FIX}")
    return None
