"""Grey images of more than 8 bits a pixel, as the 8 bits that the vision tower is given.

Scanners and cameras use a part of 16 bits: a 12-bit scan ends at 4,095, one with an offset begins at 32,768. Dividing
by 256 would leave 16 of its grey levels. So black and white are taken from a stated window, or from the image itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Window = tuple[float, float]
"""Values that become black and white."""

MIN_LEVELS = 32
"""Grey levels of a picture; with fewer, such as a mask has, the lowest and highest are made black and white."""

MIN_WHITE = 128
"""Highest value, of 255, of a picture that was made with 8 bits; below it, the values may as well be deep and dark."""

MAX_STRAYS = 8
"""Most levels at the ends of the range that are taken for padding or markers."""

LEVELS_PER_STRAY = 8
"""Levels that an image needs for each one taken for padding or a marker: a mask with some noise has fewer."""


def to_eight_bits(values: npt.NDArray[Any], window: Window | None = None) -> npt.NDArray[np.uint8]:
    """Return grey values (H, W) of any real type as 8 bits; what is not finite becomes black.

    With a window, its bounds become 0 and 255, and what is beyond them is clipped. Without one:

    - An 8-bit image that was stored as it is, by a shift of 8 bits, or multiplied by 257, is that 8-bit image again:
      one of at least MIN_LEVELS such values, up to MIN_WHITE or more.
    - Else the lowest and highest value become 0 and 255. Some values at either end that are farther from all others
      than these are from each other, such as the padding of a scan, are left out of this range.
    """
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        # A table of all values takes less time than arithmetic on every pixel.
        levels = np.flatnonzero(np.bincount(values.ravel()))
        table = _scale(np.arange(2**16), levels, window)
        return np.take(table, values)
    finite = values if np.issubdtype(values.dtype, np.integer) else np.where(np.isfinite(values), values, np.nan)
    levels = np.unique(finite)
    return _scale(finite, levels[levels == levels], window)


def _scale(values: npt.NDArray[Any], levels: npt.NDArray[Any], window: Window | None) -> npt.NDArray[np.uint8]:
    """Scale values of an image that has the sorted `levels`; NaN becomes black."""
    if window is None and (factor := _widened_by(levels)) is not None:
        narrowed: npt.NDArray[np.uint8] = np.nan_to_num(values // factor).astype(np.uint8)
        return narrowed
    low, high = _range(levels) if window is None else window
    with np.errstate(all="ignore"):
        scaled = (values.astype(np.float64) - low) * (255 / (high - low))
        rounded: npt.NDArray[np.uint8] = np.rint(np.nan_to_num(np.clip(scaled, 0, 255))).astype(np.uint8)
    return rounded


def _widened_by(levels: npt.NDArray[Any]) -> int | None:
    """Return by what the values of an 8-bit image were multiplied to give `levels`; None if they are no such image."""
    if not len(levels) or (len(levels) == 1 and levels[0] == np.floor(levels[0]) and 0 <= levels[0] <= 255):
        return 1
    if len(levels) < MIN_LEVELS or levels[0] < 0 or levels[-1] > 65535 or np.any(levels != np.floor(levels)):
        return None
    # Multiples of 256 are those of a deep image too, if its last bits are unused: what is bright tells them apart.
    factor = 1 if levels[-1] <= 255 else next((by for by in (257, 256) if not np.any(levels % by)), None)
    return factor if factor is not None and levels[-1] >= MIN_WHITE * factor else None


def _range(levels: npt.NDArray[Any]) -> Window:
    """Return the range that the sorted `levels` use; of a single one, that of its bits, so that it keeps its shade."""
    used = levels.astype(np.float64)
    if len(used) == 1:
        return (0.0, 65535.0) if 0 <= used[0] <= 65535 else (used[0] - 1, used[0] + 1)
    low, high = used[0], used[-1]
    most = min(MAX_STRAYS, len(used) // (LEVELS_PER_STRAY + 1))
    # Both ends at once: with a marker at each, neither is far from the other and all else.
    for below in range(most + 1):
        for above in range(most + 1 - below):
            first, last = below, len(used) - 1 - above
            span = used[last] - used[first]
            is_apart = (not below or used[first] - used[first - 1] > span) and (
                not above or used[last + 1] - used[last] > span
            )
            if is_apart and span < high - low:
                low, high = used[first], used[last]
    return low, high
