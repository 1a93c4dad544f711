"""One run in one directory: a lock that dies with its process."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_llava.errors import TrainingError
from lora_llava.files import shown_path

LOCK = ".lock"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold `directory`, which is made, for the length of the block.

    The kernel lets go of the lock when the process ends, however it does; worker processes do not inherit it.
    Raises TrainingError if another process holds it, or if the directory cannot be written.
    """
    # Of processes that train together, the first holds it for all.
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    path = directory / LOCK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = _acquired(path)
    except OSError as error:
        raise TrainingError(f"output_dir {shown_path(directory)} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        # The file alone locks nothing: where it cannot be removed any more, it may stay.
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def _acquired(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # lockf and not flock: a forked worker that outlives its parent would hold the latter.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = os.read(handle, 20).decode().strip() or "unknown"
            os.close(handle)
            raise TrainingError(
                f"output_dir {shown_path(path.parent)} is in use by another run (process {holder}); wait until it "
                "ends, or stop it"
            ) from error
        # A run that has just ended may have removed the file between the two calls.
        if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
            os.truncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())
            return handle
        os.close(handle)
