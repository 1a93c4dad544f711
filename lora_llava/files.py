"""Directories that appear by rename when they are complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_llava.errors import ArtifactError


def refuse_existing(output: Path) -> None:
    """Raise ArtifactError if there is anything at `output`: nothing is ever overwritten."""
    if output.exists() or output.is_symlink():
        raise ArtifactError(f"{output} exists already and is not overwritten; give another name, or remove it")


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Give an empty directory beside `output` to write into; it becomes `output` when the block ends well.

    An error, or a stop from the keyboard, removes it. Files reach the disk before the rename. Raises
    ArtifactError if `output` exists.
    """
    refuse_existing(output)
    staging = output.with_name(output.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in sorted(staging.rglob("*")):
            if path.is_file():
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
        refuse_existing(output)
        staging.rename(output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
