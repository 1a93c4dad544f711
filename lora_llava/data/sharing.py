"""What the length of a row decides: how much of the conversations about one image is computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from lora_llava.data.packing import Packing, PlanItem

Sharing = Callable[[int], float]
"""Share of the tokens that single conversations have which is computed in rows of so many tokens."""


def alone(_tokens: int) -> float:
    """Say what conversations that share nothing compute: everything."""
    return 1.0


def sharing(items: Sequence[PlanItem], branches_per_tree: int, packing: Packing) -> Sharing:
    """Find out what a row's length costs: a short one cuts trees, and each part computes the image again.

    As if the conversations about an image were all of one length.
    """
    images: dict[tuple[int, int], list[int]] = {}
    unshared = 0
    for item in items:
        if packing == "none" or not item.prefix_length:
            unshared += item.length
            continue
        count_and_own = images.setdefault((item.group, item.prefix_length), [0, 0])
        count_and_own[0] += 1
        count_and_own[1] += item.length - item.prefix_length
    trees = [
        (prefix, size, own / count)
        for (_, prefix), (count, own) in images.items()
        for size in [branches_per_tree] * (count // branches_per_tree) + [count % branches_per_tree]
    ]
    prefix, size, own = np.array(trees, dtype=float).reshape(-1, 3).T
    separate = unshared + float((size * (prefix + own)).sum())

    @cache
    def share(tokens: int) -> float:
        together = np.maximum(1, (tokens - prefix) // np.maximum(own, 1))
        parts = np.ceil(size / together)
        return (unshared + float((parts * prefix + size * own).sum())) / separate

    return share
