"""Check that every data file and directory of the run exists and can be read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lora_llava.data.images.directory import passed_over
from lora_llava.data.load import held_out_source
from lora_llava.data.sources.missing import missing
from lora_llava.data.sources.saved import is_saved
from lora_llava.errors import DataError
from lora_llava.planning.preflight.findings import Finding, Notice, Problem
from lora_llava.planning.preflight.setup import Setup
from lora_llava.recipe.fields import is_local
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.stages import DataSettings
from lora_llava.system.names import path_hint
from lora_llava.system.text import counted, listed


@dataclass(frozen=True, slots=True)
class _DataPath:
    """A data file or directory that the recipe names."""

    key: str
    path: Path
    is_directory: bool | None
    """Whether it must be a directory; None: either."""


def data_files_are_there(setup: Setup) -> Iterator[Finding]:
    """Data, validation and evaluation files, lists of excluded records and image roots can be read."""
    for data_path in _data_paths(setup.recipe):
        if (problem := _unreadable(data_path)) is not None:
            yield Problem(data_path.key, *problem)


def hub_data_is_available(setup: Setup) -> Iterator[Finding]:
    """What is no local path is not like one, and is cached, or the Hub can be reached."""
    for key, data in sources(setup.recipe):
        if not is_local(data.path) and (problem := missing(data, setup.near)) is not None:
            yield Problem(f"{key}.path", *problem)


def folders_hold_images(setup: Setup) -> Iterator[Finding]:
    """Folders of images hold nothing else: what is not named like an image, as a photo in HEIC, is left out."""
    for key, data in sources(setup.recipe):
        path = Path(data.path).expanduser()
        if path.is_dir() and not is_saved(path):
            with suppress(DataError):
                if names := passed_over(path):
                    what = f"{counted(len(names), 'file')} left out, not named like an image: {listed(names, 3)}."
                    yield Notice(f"{key}.path", f"{what} Photos in HEIC: save them as JPEG")


def sources(recipe: Recipe) -> Iterator[tuple[str, DataSettings]]:
    """Yield the key and settings of every data source of a recipe; validation from another path is one of them."""
    data_by_key = {f"stages.{stage}.data": recipe.stage(stage).data for stage in recipe.stage_names}
    if recipe.evaluation is not None:
        data_by_key["evaluation.data"] = recipe.evaluation.data
    for first, every in data_by_key.items():
        for number, data in enumerate(every.sources):
            yield from _with_validation(f"{first}.{number}" if number else first, data)


def _with_validation(key: str, data: DataSettings) -> Iterator[tuple[str, DataSettings]]:
    yield key, data
    if (held_out := held_out_source(data)) is not None:
        yield f"{key}.validation", held_out


def _data_paths(recipe: Recipe) -> Iterator[_DataPath]:
    for key, data in sources(recipe):
        path = Path(data.path).expanduser()
        if data.columns is None and data.path.endswith((".json", ".jsonl")):
            yield _DataPath(f"{key}.path", path, is_directory=False)
        elif path.exists() or is_local(data.path):
            yield _DataPath(f"{key}.path", path, is_directory=None)
        # Validation has the image root of its stage.
        if data.image_root is not None and not key.endswith(".validation"):
            yield _DataPath(f"{key}.image_root", Path(data.image_root), is_directory=True)
        for root in () if key.endswith(".validation") else data.image_roots:
            yield _DataPath(f"{key}.image_roots", Path(root), is_directory=True)
        if data.exclude is not None:
            yield _DataPath(f"{key}.exclude", Path(data.exclude), is_directory=False)


def _unreadable(data_path: _DataPath) -> tuple[str, str] | None:
    """Return what is wrong with a path, and what to do; None if nothing is."""
    path = data_path.path
    if path.is_symlink() and not path.exists():
        return f"{path} is a link to {path.readlink()}, which is not there", "Restore that, or correct the path."
    if not path.exists():
        return f"{path} does not exist", path_hint(path)
    if data_path.is_directory is True and not path.is_dir():
        return f"{path} is a file, a directory is needed", "Give the directory that image paths start from."
    if data_path.is_directory is False and path.is_dir():
        return f"{path} is a directory, a file is needed", "Give the path of the file in it."
    if not path.is_dir() and not path.is_file():
        return f"{path} is neither a file nor a directory", "Give a regular file."
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        return f"{path} cannot be read: permission denied", "Change its permissions."
    if path.is_file() and path.stat().st_size == 0 and not data_path.key.endswith(".exclude"):
        return f"{path} is empty", "Write the records to it, or give another file."
    if path.is_dir() and not any(path.iterdir()):
        return f"{path} is an empty directory", "Give the directory that holds the files."
    return None
