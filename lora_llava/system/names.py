"""Find the file that a misspelled name means."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

_MIN_SIMILARITY = 0.6
"""Lowest similarity of a name that is suggested, of 1."""
_MAX_COMPARED = 2_000
"""Directory entries to compare (a tenth of a second); of more, only those with the same first letter."""


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
