"""Files and directories that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_llava.errors import ArtifactError

PARTIAL, REMOVED = ".partial", ".removed"
"""Endings of what is being written, or being removed: never read, and cleared away by the next run."""


def refuse_existing(output: Path) -> None:
    """Raise ArtifactError if there is anything at `output`: nothing is ever overwritten."""
    if output.exists() or output.is_symlink():
        raise ArtifactError(f"{output} exists already and is not overwritten; give another name, or remove it")


def fsync(path: Path) -> None:
    """Bring a file's bytes, or a directory's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Give an empty directory beside `output` to write into; it becomes `output` when the block ends well.

    An error, or a stop from the keyboard, removes it. Files reach the disk before the rename, and the rename
    before the block is left. Raises ArtifactError if `output` exists.
    """
    refuse_existing(output)
    staging = output.with_name(output.name + PARTIAL)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in [*sorted(staging.rglob("*")), staging]:
            fsync(path)
        refuse_existing(output)
        staging.rename(output)
        fsync(output.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file that holds either `text` or, if that does not come to an end, what it held before."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.write_text(text, encoding="utf-8")
        fsync(partial)
        partial.replace(path)
        fsync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_directory(directory: Path) -> None:
    """Remove a directory, if it is there; under its name it is never seen in part."""
    if directory.exists():
        doomed = directory.with_name(directory.name + REMOVED)
        shutil.rmtree(doomed, ignore_errors=True)
        directory.rename(doomed)
        shutil.rmtree(doomed)


def clear_leftovers(directory: Path) -> None:
    """Remove what a run that was killed had been writing or removing in `directory`."""
    for path in [*directory.glob(f"*{PARTIAL}"), *directory.glob(f"*{REMOVED}")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def shown_path(path: Path) -> str:
    """Write a path relative to the current directory if it lies below it, to be pasted into a command."""
    return os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path)
