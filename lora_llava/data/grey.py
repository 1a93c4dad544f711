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
"""Grey levels that an image needs before a single value far from all others is taken for padding or a marker."""


def to_eight_bits(values: npt.NDArray[Any], window: Window | None = None) -> npt.NDArray[np.uint8]:
    """Return grey values (H, W) of any real type as 8 bits; what is not finite becomes black.

    With a window, its bounds become 0 and 255, and what is beyond them is clipped. Without one:

    - Integers from 0 to 255 stay as they are.
    - An 8-bit image that was widened, by 257 or by a shift of 8 bits, is that 8-bit image again.
    - Else the lowest and highest value become 0 and 255. A lowest or highest value that is farther from all others
      than these are from each other, such as the padding of a scan, is left out of this range.
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
    """Return by what 8 bits were multiplied to give all `levels`, 1 if they fit as they are; None for deeper values."""
    if not len(levels):
        return 1
    if levels[0] < 0 or levels[-1] > 65535 or np.any(levels != np.floor(levels)):
        return None
    if levels[-1] <= 255:
        return 1
    return next((factor for factor in (257, 256) if not np.any(levels % factor)), None)


def _range(levels: npt.NDArray[Any]) -> Window:
    """Return the range that the sorted `levels` use; of a single one, that of its bits, so that it keeps its shade."""
    used = levels.astype(np.float64)
    if len(used) == 1:
        return (0.0, 65535.0) if 0 <= used[0] <= 65535 else (used[0] - 1, used[0] + 1)
    if len(used) > MIN_LEVELS and used[1] - used[0] > used[-1] - used[1]:
        used = used[1:]
    if len(used) > MIN_LEVELS and used[-1] - used[-2] > used[-2] - used[0]:
        used = used[:-1]
    return used[0], used[-1]
