"""Files and directories that are whole or absent, whatever happens while they are written.

What is being written lies in a staging directory: its name cannot be guessed, and a claim inside it holds its inode
and is locked as long as its process lives. Only a directory with such a claim is ever cleared away; by its name alone
only an empty one that is no longer new, which a kill left before its claim was written or after it was removed.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_llava.errors import ArtifactError, RecipeError

STAGING = ".lora-llava-"
"""Begins the names of staging directories."""
_CLAIM = "claim.json"
_MADE_BY = "lora-llava"
_NEW_SECONDS = 60
"""An empty staging directory may be about to get its claim for so long."""

Place = Callable[[Path, Path], None]
"""Moves a whole directory, which the first path names, to where the second says."""

_in_use: dict[int, int] = {}
"""Staging directories of this process: by inode, the handle whose lock says so."""


def refuse_existing(output: Path) -> None:
    """Raise ArtifactError if there is anything at `output`: nothing is ever overwritten."""
    if output.exists() or output.is_symlink():
        raise ArtifactError(f"{output} exists already and is not overwritten; give another name, or remove it")
    nearest = next(path for path in output.absolute().parents if os.path.lexists(path))
    if not nearest.is_dir():
        raise ArtifactError(f"{output} cannot be made: {nearest} is not a directory; give another name")


def refuse_results_in(output: Path) -> None:
    """Raise RecipeError if `output` is a file, or a directory with anything in it: results are not overwritten."""
    if output.exists() and not output.is_dir():
        raise RecipeError(f"{output} is a file; give a directory as output")
    if output.is_dir() and any(output.iterdir()):
        raise RecipeError(f"{output} is not empty, and results are not overwritten; give another output directory")


def fsync(path: Path) -> None:
    """Bring a file's bytes, or a directory's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directories(directory: Path) -> list[Path]:
    """Make a directory and its parents; return those that were not there, the outermost first."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def remove_empty(directories: list[Path]) -> None:
    """Remove directories, the innermost first; one that holds anything, or is a link, stays."""
    for directory in sorted(directories, key=lambda path: len(path.parts), reverse=True):
        if not directory.is_symlink():
            with suppress(OSError):
                directory.rmdir()


def is_elsewhere(directory: Path) -> bool:
    """Tell whether a directory leads to another disk, or may: a link to a directory, or a mount point."""
    return directory.is_dir() and (directory.is_symlink() or directory.is_mount())


@contextmanager
def staging_in(parent: Path) -> Iterator[Path]:
    """Give an empty staging directory below `parent`, which is removed when the block ends."""
    clear_stale(parent)
    directory = Path(tempfile.mkdtemp(prefix=STAGING, dir=parent))
    inode, handle = directory.stat().st_ino, -1
    try:
        handle = os.open(directory / _CLAIM, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        _in_use[inode] = handle
        # A file system without locks: then nobody clears the directory away but this process.
        with suppress(OSError):
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(handle, json.dumps({"made_by": _MADE_BY, "inode": inode}).encode())
        yield directory
    finally:
        _remove_staging(directory)
        _in_use.pop(inode, None)
        if handle >= 0:
            os.close(handle)


def clear_stale(parent: Path) -> None:
    """Remove the staging directories below `parent` whose processes were killed."""
    try:
        with os.scandir(parent) as entries:
            named = [one for one in entries if one.name.startswith(STAGING) and one.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for entry in named:
        # Not entry.inode(): of a file system laid over another it may be that of the one below.
        if entry.stat(follow_symlinks=False).st_ino not in _in_use:
            _clear(Path(entry.path))


def is_staging(directory: Path) -> bool:
    """Tell whether a directory is one that `staging_in` made, by its claim."""
    if directory.is_symlink() or not directory.is_dir():
        return False
    # Not opened: closing it again would give up the lock that this process holds.
    if directory.stat().st_ino in _in_use:
        return True
    try:
        handle = os.open(directory / _CLAIM, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return _claims(handle, directory)
    finally:
        os.close(handle)


def _claims(handle: int, directory: Path) -> bool:
    try:
        content = json.loads(os.read(handle, 200))
    except (OSError, ValueError):
        return False
    return bool(content == {"made_by": _MADE_BY, "inode": directory.stat().st_ino})


def _clear(directory: Path) -> None:
    try:
        handle = os.open(directory / _CLAIM, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        # Its process was killed before the first file or after the last; a living one is done within the time.
        with suppress(OSError):
            if time.time() - directory.stat().st_mtime > _NEW_SECONDS:
                directory.rmdir()
        return
    except OSError:
        return
    try:
        if _claims(handle, directory):
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_staging(directory)
    except OSError:
        # Its process lives.
        return
    finally:
        os.close(handle)


def _remove_staging(directory: Path) -> None:
    """Remove a staging directory, its claim last: what a kill leaves of it is still known."""
    with suppress(OSError):
        for path in directory.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _CLAIM:
                path.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def place_new(staged_directory: Path, output: Path) -> None:
    """Give a whole directory its name; ArtifactError if there is something of that name."""
    refuse_existing(output)
    staged_directory.rename(output)


@contextmanager
def staged(output: Path, place: Place = place_new) -> Iterator[Path]:
    """Give an empty directory near `output` to write into; it becomes `output`, by `place`, when the block ends well.

    An error, or a stop from the keyboard, removes it, and the parents that were made for it. Files reach the disk
    before `place` is called, and what it did before the block is left. Raises ArtifactError if `output` exists, unless
    `place` says otherwise.
    """
    if place is place_new:
        refuse_existing(output)
    # A directory that the user linked to another disk is filled there.
    parent = output if is_elsewhere(output) else output.parent
    made = make_directories(parent)
    try:
        with staging_in(parent) as staging:
            inside = staging / output.name
            inside.mkdir()
            yield inside
            flush_tree(inside)
            place(inside, output)
            fsync(parent)
    except BaseException:
        remove_empty(made)
        raise


def flush_tree(directory: Path) -> None:
    """Bring all files below a directory, and the directories, to the disk."""
    for path in [*sorted(directory.rglob("*")), directory]:
        fsync(path)


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Give a path to write a file to, which takes the name `path`, replacing what is there, when the block ends well.

    The block may be left before anything was written; then nothing is replaced.
    """
    with staging_in(path.parent) as staging:
        temporary = staging / path.name
        yield temporary
        if temporary.exists():
            fsync(temporary)
            temporary.replace(path)
            fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file that holds either `text` or, if that does not come to an end, what it held before."""
    with staged_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def shown_path(path: Path) -> str:
    """Write a path relative to the current directory if it lies below it, to be pasted into a command."""
    return os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path)


def json_text(value: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """Return `value` as JSON; NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value
