"""Run the same passes in every process, as a sharded model needs, whose weights are gathered from all of them.

Outside of `in_lockstep` each process has as many passes as it has rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lora_llava.data.rows import PackedRows
from lora_llava.system.ranks import largest, own_share

_together = False


def is_in_lockstep() -> bool:
    """Tell whether the processes must run the same number of passes."""
    return _together


@contextmanager
def in_lockstep(together: bool) -> Iterator[None]:
    """Keep the passes of all processes alike inside the `with` block; False changes nothing."""
    global _together
    before, _together = _together, together
    try:
        yield
    finally:
        _together = before


def own_indices(count: int) -> range:
    """Return which of `count` rows this process computes: its share, or in lockstep all of them."""
    return range(count) if _together else own_share(count)


def num_passes(count: int) -> int:
    """Return how many passes this process must run if it needs `count`; in lockstep as many as any process needs."""
    return largest(count) if _together else count


def idle_index(rows: PackedRows) -> int:
    """Return the index of the shortest conversation, for a pass that only has to gather: if possible with an image.

    In a stage that trains the projector alone, a row without an image has no backward pass.
    """
    records, encoded = rows.records, rows.encoded
    return min(range(len(records)), key=lambda index: (records[index].image is None, len(encoded[index].input_ids)))
