"""Evenly spaced samples of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def spread(items: Sequence[T], count: int) -> list[T]:
    """Return `count` evenly spaced items from the start to the end; all of them if there are fewer."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]
