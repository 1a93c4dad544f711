"""Suggest what a misspelled name means: a word of those that there are, or a file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_llava.system.files import shown_path
from lora_llava.system.text import printable

_MIN_SIMILARITY = 0.6
"""Lowest similarity of a name that is suggested, of 1."""
_MAX_COMPARED = 2_000
"""Directory entries to compare (a tenth of a second); of more, only those with the same first letter."""


def did_you_mean(name: object | None, otherwise: str = "") -> str:
    """Return the question whether `name` is meant, which ends the message of an error; without one, `otherwise`."""
    return otherwise if name is None else f"Did you mean {printable(str(name))}?"


def similar(word: str, known: Iterable[str], least: float = _MIN_SIMILARITY) -> str | None:
    """Return the known word most similar to `word`; None if none is. `least`: lowest similarity, of 1."""
    return next(iter(difflib.get_close_matches(word, known, 1, least)), None)


def path_hint(path: Path, directories: Sequence[Path] | None = None) -> str:
    """Return what to do about a missing file: take the one most similar to its name, there or in `directories`."""
    near = nearest(path.name, [path.parent] if directories is None else directories)
    return did_you_mean(near and shown_path(path.with_name(near)), "Correct the path.")


def nearest(name: str, directories: Sequence[Path], least: float = _MIN_SIMILARITY) -> str | None:
    """Return the entry most similar to `name` in the first of `directories` that has one; None if none has.

    Suffixes do not count: `valid.json` is not similar to `d.json`. `least`: lowest similarity, of 1.
    """
    stem = _stem(name)
    for directory in directories:
        try:
            entries = [path.name for path in sorted(directory.iterdir()) if path.name != name]
        except OSError:
            continue
        if len(entries) > _MAX_COMPARED:
            entries = [entry for entry in entries if entry[:1] == name[:1]][:_MAX_COMPARED]
        similarity = {entry: difflib.SequenceMatcher(None, stem, _stem(entry)).ratio() for entry in entries}
        best = max(
            similarity, key=lambda entry: (similarity[entry], Path(entry).suffix == Path(name).suffix), default=None
        )
        if best is not None and similarity[best] >= least:
            return best
    return None


def _stem(name: str) -> str:
    return Path(name).stem.lower()
