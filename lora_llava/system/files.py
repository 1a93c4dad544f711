"""Atomic writes: files and directories are complete or absent, whatever happens while they are written.

Content is written to a staging directory with an unguessable name first. A claim file in it records its inode and is
locked while its process lives. Only a directory with an unlocked claim is removed as stale. Without a claim, only an
empty directory that is no longer new is removed: its process was killed before writing or after removing the claim.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_llava.errors import ArtifactError, LoraLlavaError, ModelError, RecipeError
from lora_llava.system.text import first_line, is_unicode, printable, texts_in

STAGING = ".lora-llava-"
"""Prefix of the names of staging directories."""
_CLAIM = "claim.json"
_MADE_BY = "lora-llava"
_NEW_SECONDS = 60
"""Age in seconds up to which an empty staging directory may still get its claim."""

_MAX_JSON_BYTES = 40 * 2**20
"""Largest JSON file of a model; the largest tokenizers take 17 MB."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""Escaped half of a character in a JSON file, which most likely precedes or follows the other half."""

Place = Callable[[Path, Path], None]
"""Moves a complete directory, the first path, to the second."""

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""What a disk says that is full, too small, damaged or read-only."""
_FIXES = {
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOSPC: "free some space, or give an output on another disk",
    errno.EDQUOT: "free some space, or give an output on another disk",
}
"""What to do about an output that cannot be created; for anything else, take another directory."""

_in_use: set[tuple[int, int]] = set()
"""Staging directories of this process, by device and inode: directories on two disks can have one inode number."""


def refuse_existing(output: Path, kind: type[LoraLlavaError] = ArtifactError) -> None:
    """Raise `kind` if `output` exists or cannot be created: nothing is ever overwritten."""
    if "\0" in str(output):
        raise kind(f"{printable(str(output), 60)} contains a NUL character, which no path has; remove it")
    if os.path.lexists(output):
        raise kind(f"{output} already exists and is not overwritten; give another name, or remove it")
    refuse_unwritable(output, kind)


def refuse_unwritable(output: Path, kind: type[LoraLlavaError]) -> None:
    """Raise `kind` if nothing can be written at `output`, which does not exist or is a directory.

    An empty directory is created for a moment: permissions alone do not show that a disk is full or read-only, and say
    nothing of what root may do.
    """
    absolute = output.absolute()
    nearest = next(path for path in (absolute, *absolute.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise kind(f"{output} cannot be created: {nearest} is not a directory; give another name")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise kind(
            f"{output} cannot be created: no permission to write to {nearest}; change its permissions, or give "
            "another name"
        )
    missing = [nearest / name for name in absolute.parts[len(nearest.parts) :]]
    try:
        for path in (*missing, absolute):
            # Longer than the file system allows.
            with suppress(FileNotFoundError):
                path.lstat()
        Path(tempfile.mkdtemp(prefix=STAGING, dir=nearest)).rmdir()
    except OSError as error:
        fix = _FIXES.get(error.errno or 0, "give an output elsewhere")
        raise kind(f"{output} cannot be created in {nearest}: {error.strerror}; {fix}") from error


def refuse_results_in(output: Path) -> None:
    """Raise RecipeError if `output` is a file, or a directory with anything in it: results are not overwritten."""
    # Path.is_dir() raises for a name that is too long.
    if os.path.lexists(output):
        if not output.is_dir():
            raise RecipeError(f"{output} is not a directory; give a directory as output")
        if any(output.iterdir()):
            raise RecipeError(f"{output} is not empty, and results are not overwritten; give another output directory")
    refuse_unwritable(output, RecipeError)


def fsync(path: Path) -> None:
    """Flush a file's bytes, or a directory's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directories(directory: Path) -> list[Path]:
    """Create a directory and its parents; return those that were missing, outermost first."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def remove_empty(directories: list[Path]) -> None:
    """Remove directories, innermost first; keep links and directories that are not empty."""
    for directory in sorted(directories, key=lambda path: len(path.parts), reverse=True):
        if not directory.is_symlink():
            with suppress(OSError):
                directory.rmdir()


def is_elsewhere(directory: Path) -> bool:
    """Tell whether a directory may be on another disk: a link to a directory, or a mount point."""
    return directory.is_dir() and (directory.is_symlink() or directory.is_mount())


@contextmanager
def staging_in(parent: Path) -> Iterator[Path]:
    """Yield an empty staging directory in `parent`, which is removed at the end of the block."""
    clear_stale(parent)
    directory = Path(tempfile.mkdtemp(prefix=STAGING, dir=parent))
    status, handle = directory.stat(), -1
    try:
        handle = os.open(directory / _CLAIM, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        _in_use.add(_disk_and_inode(status))
        # On a file system without locks, only this process removes the directory.
        with suppress(OSError):
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(handle, json.dumps({"made_by": _MADE_BY, "inode": status.st_ino}).encode())
        yield directory
    finally:
        _remove_staging(directory)
        _in_use.discard(_disk_and_inode(status))
        if handle >= 0:
            os.close(handle)


def clear_stale(parent: Path) -> None:
    """Remove the staging directories in `parent` whose processes were killed."""
    try:
        with os.scandir(parent) as entries:
            named = [
                entry for entry in entries if entry.name.startswith(STAGING) and entry.is_dir(follow_symlinks=False)
            ]
    except OSError:
        return
    for entry in named:
        # Not entry.inode(): on an overlay file system it may be the inode of the lower one. Another thread may have
        # moved the directory by now.
        with suppress(FileNotFoundError):
            if _disk_and_inode(entry.stat(follow_symlinks=False)) not in _in_use:
                _clear(Path(entry.path))


def is_staging(directory: Path) -> bool:
    """Tell by its claim whether a directory was created by `staging_in`."""
    if directory.is_symlink() or not directory.is_dir():
        return False
    # Do not open the claim: closing it would release the lock that this process holds.
    if _disk_and_inode(directory.stat()) in _in_use:
        return True
    try:
        handle = os.open(directory / _CLAIM, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return _claims(handle, directory)
    finally:
        os.close(handle)


def _disk_and_inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


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
        # Its process was killed before the first file or after the last; a live one would be done by now.
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
        # Its process is alive.
        return
    finally:
        os.close(handle)


def _remove_staging(directory: Path) -> None:
    """Remove a staging directory, its claim last, so that a kill leaves it recognizable."""
    with suppress(OSError):
        for path in directory.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _CLAIM:
                path.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def place_new(staged_directory: Path, output: Path) -> None:
    """Move a complete directory to `output`. Raises ArtifactError if `output` exists."""
    refuse_existing(output)
    staged_directory.rename(output)


@contextmanager
def staged(output: Path, place: Place = place_new) -> Iterator[Path]:
    """Yield an empty directory near `output`; when the block succeeds, `place` moves it to `output`.

    An error, or Ctrl-C, removes it and the parents created for it. Files are flushed to disk before `place` is called,
    and the move before the block is left. Raises ArtifactError if `output` exists, unless another `place` allows it.
    """
    if place is place_new:
        refuse_existing(output)
    # If the user linked the directory to another disk, write there.
    parent = output if is_elsewhere(output) else output.parent
    created = make_directories(parent)
    try:
        with staging_in(parent) as staging:
            inside = staging / output.name
            inside.mkdir()
            yield inside
            for path in [*sorted(inside.rglob("*")), inside]:
                fsync(path)
            place(inside, output)
            fsync(parent)
    except BaseException:
        remove_empty(created)
        raise


@contextmanager
def staged_result(output: Path) -> Iterator[Path]:
    """Yield as `staged` does, for the result of a command; ArtifactError if the disk takes no more, or not so much."""
    with disk_errors(output, "Nothing was written"), staged(output) as staging:
        yield staging


@contextmanager
def disk_errors(output: Path, state: str) -> Iterator[None]:
    """Raise ArtifactError if the disk of `output` takes no more, or not so much; `state` says what became of it."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        nearest = next(path for path in output.absolute().parents if path.is_dir())
        free = shutil.disk_usage(nearest).free / 2**20
        raise ArtifactError(
            f"{error.filename or output.name} cannot be written to {shown_path(nearest)}: {error.strerror} "
            f"({free:,.0f} MiB are free there). {state}; free some space, or name an output on another disk."
        ) from error


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to; when the block succeeds, the file replaces `path`.

    If the block writes nothing, nothing is replaced.
    """
    with staging_in(path.parent) as staging:
        temporary = staging / path.name
        yield temporary
        if temporary.exists():
            fsync(temporary)
            temporary.replace(path)
            fsync(path.parent)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to; when the block succeeds, it becomes `path`, whose directories are created.

    Raises RecipeError if `path` exists. After an error, nothing is left.
    """
    refuse_existing(path, RecipeError)
    created = make_directories(path.parent)
    try:
        with staged_file(path) as temporary:
            yield temporary
            refuse_existing(path, RecipeError)
    except BaseException:
        remove_empty(created)
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` to a file atomically: if interrupted, the file keeps its old content."""
    with staged_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def shown_path(path: Path) -> str:
    """Return a path for pasting into a command: relative if it is inside the current directory."""
    return os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path)


def joined(directory: Path, path: str) -> Path:
    """Return `path` as seen from a directory, without the `..` in it; a link at its end stays one."""
    # The file system follows `..` from the real directory, not from the name of a link.
    return Path(os.path.normpath(directory.resolve() / path))


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_json(path: Path, error: type[LoraLlavaError] = ModelError, fix: str = "download it again") -> dict[str, Any]:
    """Read a JSON file that holds a mapping; {} if there is no such file.

    Anybody may have written it. Raises `error`, which names the file and ends with `fix`, if it is damaged, too large,
    or holds anything else.
    """
    try:
        if not path.is_file():
            return {}
        if (size := path.stat().st_size) > _MAX_JSON_BYTES:
            raise error(f"{path} has {size:,} bytes, at most {_MAX_JSON_BYTES:,} are read; {fix}")
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror}; {fix}") from cause
    except RecursionError as cause:
        raise error(f"{path} is damaged (nested too deeply); {fix}") from cause
    # Not JSON, not UTF-8, or a number of thousands of digits.
    except ValueError as cause:
        raise error(f"{path} is damaged (not valid JSON: {first_line(cause)}); {fix}") from cause
    if not isinstance(data, dict):
        what = "null" if data is None else f"a {type(data).__name__}"
        raise error(f"{path} is damaged (it contains {what}, not a mapping); {fix}")
    if _SURROGATE.search(text) and (half := next((text for text in texts_in(data) if not is_unicode(text)), None)):
        raise error(f"{path} is damaged (it contains {half!r:.80}, half of a surrogate pair); {fix}")
    return data


def refuse_irregular(directory: Path, kind: type[LoraLlavaError]) -> None:
    """Raise an error of `kind` if a directory holds a pipe or a device, which a library would read without end."""
    if directory.is_dir():
        for path in sorted(directory.iterdir()):
            if path.exists() and not path.is_dir() and not path.is_file():
                raise kind(f"{path} is not a regular file; remove it, or take the directory from its source again")


def find_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON file that holds a mapping; None if it is missing or damaged, which is reported elsewhere."""
    try:
        return read_json(path) if path.is_file() else None
    except ModelError:
        return None


def json_text(value: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """Return `value` as JSON; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
