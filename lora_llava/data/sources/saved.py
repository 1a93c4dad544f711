"""Open data sets that `datasets` saved to disk (`save_to_disk`): Arrow files with their description."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_llava.errors import DataError
from lora_llava.system.text import first_line, listed, printable

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_ONLY_SPLIT = "train"
_MAX_BYTES = 2**24
"""Largest description that is read."""


def is_saved(directory: Path) -> bool:
    """Tell whether a directory holds a saved data set, or several splits of one."""
    return (directory / _STATE).is_file() or (directory / _SPLITS).is_file()


def open_saved(directory: Path, split: str) -> Any:
    """Open a split of a saved data set.

    Raises DataError if it has no such split, cannot be read, or names files elsewhere.
    """
    names = saved_splits(directory)
    if split not in names or Path(split).name != split:
        raise no_split(directory.name, split, names)
    if (directory / _SPLITS).is_file():
        directory = directory / split
    files = _read(directory / _STATE).get("_data_files")
    for file in files if isinstance(files, list) else []:
        name = file.get("filename") if isinstance(file, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise DataError(f"{directory.name}: {_STATE} names {printable(repr(name), 80)}, outside of the directory")
    # Imported here: slow, and not needed for other data.
    import datasets

    try:
        return datasets.load_from_disk(str(directory))
    except Exception as error:  # noqa: BLE001 - arrow and the library raise anything
        raise DataError(f"{directory.name}: the saved data set cannot be read: {first_line(error)}") from None


def saved_splits(directory: Path) -> list[str]:
    """Return the splits of a saved data set; one without has `train`, as `datasets` calls rows without a split."""
    if not (directory / _SPLITS).is_file():
        return [_ONLY_SPLIT]
    splits = _read(directory / _SPLITS).get("splits")
    return [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []


def no_split(name: str, split: str, splits: Iterable[str]) -> DataError:
    """Return the error for data without the split that is asked for."""
    shown = listed([printable(other, 40) for other in splits]) or "none"
    return DataError(
        f"{name}: split: there is no {printable(split, 40)!r}; it has {shown}. Name one of them: in a recipe with "
        "split, in a command with --split"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path.parent.name}: {path.name} is too large for a description; save the data set again")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise DataError(f"{path.parent.name}: {path.name} is damaged; save the data set again")
    return content
