"""Lock a run's directory; the lock ends with its process."""

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
"""Content of a lock file: a process id."""

_held: set[Path] = set()
"""Locks of this process. Closing any other handle of such a file would release its lock."""


@contextmanager
def locked(directory: Path, name: str = "output_dir") -> Iterator[None]:
    """Hold the lock of `directory`, which is created if needed; remove the directory again if it stays empty.

    `name`: the setting or option that names the directory. The kernel releases the lock when the process ends, however
    it ends; worker processes do not inherit it. Raises TrainingError if another process holds the lock, if the
    directory cannot be written, or if a file with the lock's name is not a lock.
    """
    path = directory / LOCK
    # Locks do not keep a process from itself, such as a second thread.
    if path.resolve() in _held:
        raise TrainingError(f"{name} {shown_path(directory)} is in use by another run of this process")
    created: list[Path] = []
    try:
        created = make_directories(directory)
        handle = _acquire(path, name)
    except OSError as error:
        remove_empty(created)
        raise TrainingError(f"{name} {shown_path(directory)} cannot be written: {error.strerror}") from error
    _held.add(path.resolve())
    try:
        yield
    finally:
        # A leftover file locks nothing, so it does no harm if it cannot be removed.
        with suppress(OSError):
            if _is_open_at(handle, path):
                path.unlink()
        _held.discard(path.resolve())
        os.close(handle)
        remove_empty(created)


def is_locked(directory: Path) -> bool:
    """Tell whether a run holds the lock of `directory`; write nothing."""
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


def is_locked_elsewhere(directory: Path) -> bool:
    """Tell whether another process holds the lock of `directory`; write nothing."""
    return (directory / LOCK).resolve() not in _held and is_locked(directory)


def _acquire(path: Path, name: str) -> int:
    while True:
        if path.is_symlink():
            raise TrainingError(f"{shown_path(path)} is a link, which the kit did not make; remove it")
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            # lockf, not flock: a forked worker that outlives its parent would still hold a flock.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            content = os.pread(handle, 64, 0) if stat.S_ISREG(os.fstat(handle).st_mode) else b"?"
        except (BlockingIOError, PermissionError) as error:
            holder = os.read(handle, 20).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise TrainingError(
                f"{name} {shown_path(path.parent)} is in use by another run (process {holder}); wait until it "
                "ends, or stop it"
            ) from error
        if not _CONTENT.fullmatch(content):
            os.close(handle)
            raise TrainingError(f"{shown_path(path)} is not a lock of the kit but has its name; move it elsewhere")
        # A run that has just ended may have removed the file between open and lock: then try again.
        if _is_open_at(handle, path):
            os.truncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
            return handle
        os.close(handle)


def _is_open_at(handle: int, path: Path) -> bool:
    """Tell whether the open file is still the file at `path`."""
    try:
        return os.fstat(handle).st_ino == path.lstat().st_ino
    except OSError:
        return False
