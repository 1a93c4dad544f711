"""One run in one directory: a lock that dies with its process."""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_llava.errors import TrainingError
from lora_llava.system.files import make_directories, remove_empty, shown_path

LOCK = ".lora-llava.lock"
_CONTENT = re.compile(rb"(\d{1,10}\n)?")
"""What the kit writes to it: the number of a process."""

_held: set[Path] = set()
"""Locks of this process, which closing any handle of them would give up."""


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold `directory`, which is made, for the length of the block; one that is empty then is removed again.

    The kernel lets go of the lock when the process ends, however it does; worker processes do not inherit it.
    Raises TrainingError if another process holds it, if the directory cannot be written, or if what has the lock's
    name was not made by the kit.
    """
    path = directory / LOCK
    made: list[Path] = []
    try:
        made = make_directories(directory)
        handle = _acquired(path)
    except OSError as error:
        remove_empty(made)
        raise TrainingError(f"output_dir {shown_path(directory)} cannot be written: {error.strerror}") from error
    _held.add(path.resolve())
    try:
        yield
    finally:
        # The file alone locks nothing: where it cannot be removed any more, it may stay.
        with suppress(OSError):
            if _is_at(handle, path):
                path.unlink()
        _held.discard(path.resolve())
        os.close(handle)
        remove_empty(made)


def is_locked(directory: Path) -> bool:
    """Tell whether a run holds `directory`; nothing is written."""
    path = directory / LOCK
    if path.resolve() in _held:
        return True
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _acquired(path: Path) -> int:
    while True:
        if path.is_symlink():
            raise TrainingError(f"{shown_path(path)} is a link, and the kit made none there; remove it")
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            # lockf and not flock: a forked worker that outlives its parent would hold the latter.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            content = os.pread(handle, 64, 0) if stat.S_ISREG(os.fstat(handle).st_mode) else b"?"
        except (BlockingIOError, PermissionError) as error:
            holder = os.read(handle, 20).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise TrainingError(
                f"output_dir {shown_path(path.parent)} is in use by another run (process {holder}); wait until it "
                "ends, or stop it"
            ) from error
        if not _CONTENT.fullmatch(content):
            os.close(handle)
            raise TrainingError(f"{shown_path(path)} is not a lock of the kit, but has its name; move it elsewhere")
        # A run that has just ended may have removed the file between the two calls.
        if _is_at(handle, path):
            os.truncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
            return handle
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Tell whether the open file is still the one at `path`."""
    try:
        return os.fstat(handle).st_ino == path.lstat().st_ino
    except OSError:
        return False
