"""Convert grayscale images of more than 8 bits per pixel to the 8 bits that the vision tower takes.

Scanners and cameras use only a part of 16 bits: a 12-bit scan ends at 4,095, one with an offset starts at 32,768.
Dividing by 256 would leave 16 gray levels of it. So black and white come from a given window, or from the image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Window = tuple[float, float]
"""Values that become black and white."""

MIN_LEVELS = 32
"""Minimum gray levels of a picture; with fewer, as in a mask, the lowest and highest become black and white."""

_MIN_WHITE = 128
"""Minimum highest value (of 255) of a widened 8-bit picture; below it, the image may be a dark one of more bits."""

_MAX_STRAYS = 8
"""Maximum number of levels at the ends of the range that are treated as padding or markers."""

LEVELS_PER_STRAY = 8
"""Levels required for each level treated as padding or marker: a mask with some noise has fewer."""


def to_eight_bits(values: npt.NDArray[Any], window: Window | None = None) -> npt.NDArray[np.uint8]:
    """Convert gray values (H, W) of any real dtype to uint8 (H, W); values that are not finite become black.

    With a window, its bounds become 0 and 255, and values outside are clipped. Without one:

    - An 8-bit image that was stored unchanged, shifted by 8 bits, or multiplied by 257 becomes the original again, if
      it has at least MIN_LEVELS levels, the highest `_MIN_WHITE` or more.
    - Otherwise the lowest and highest values become 0 and 255. Values at either end that are farther from the rest
      than the rest spans, such as the padding of a scan, are left out of this range.
    """
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        # A lookup table is faster than arithmetic on every pixel.
        levels = np.flatnonzero(np.bincount(values.ravel()))
        table = _scale(np.arange(2**16), levels, window)
        return np.take(table, values)
    finite = values if np.issubdtype(values.dtype, np.integer) else np.where(np.isfinite(values), values, np.nan)
    levels = np.unique(finite)
    return _scale(finite, levels[levels == levels], window)


def _scale(values: npt.NDArray[Any], levels: npt.NDArray[Any], window: Window | None) -> npt.NDArray[np.uint8]:
    """Scale `values` of any shape to uint8; `levels` (L,) are the sorted levels of the image, and NaN becomes black."""
    if window is None and (factor := _widened_by(levels)) is not None:
        narrowed: npt.NDArray[np.uint8] = np.nan_to_num(values // factor).astype(np.uint8)
        return narrowed
    low, high = _range(levels) if window is None else window
    with np.errstate(all="ignore"):
        scaled = (values.astype(np.float64) - low) * (255 / (high - low))
        rounded: npt.NDArray[np.uint8] = np.rint(np.nan_to_num(np.clip(scaled, 0, 255))).astype(np.uint8)
    return rounded


def _widened_by(levels: npt.NDArray[Any]) -> int | None:
    """Return the factor that widened 8-bit values to `levels` (L,); None if they are no widened 8-bit image."""
    if not len(levels) or (len(levels) == 1 and levels[0] == np.floor(levels[0]) and 0 <= levels[0] <= 255):
        return 1
    if len(levels) < MIN_LEVELS or levels[0] < 0 or levels[-1] > 65535 or np.any(levels != np.floor(levels)):
        return None
    # A 16-bit image with unused low bits also has multiples of 256: the brightest value tells them apart.
    factor = 1 if levels[-1] <= 255 else next((by for by in (257, 256) if not np.any(levels % by)), None)
    return factor if factor is not None and levels[-1] >= _MIN_WHITE * factor else None


def _range(levels: npt.NDArray[Any]) -> Window:
    """Return the range of the sorted `levels` (L,); for a single level the full range, so that it keeps its shade."""
    used = levels.astype(np.float64)
    if len(used) == 1:
        return (0.0, 65535.0) if 0 <= used[0] <= 65535 else (used[0] - 1, used[0] + 1)
    low, high = used[0], used[-1]
    most = min(_MAX_STRAYS, len(used) // (LEVELS_PER_STRAY + 1))
    # Both ends together: with a marker at each end, neither is far from everything else.
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
