"""Boxes as LLaVA-1.5 reads and writes them: corners relative to the image padded to a square."""

from __future__ import annotations

from lora_llava.data.convert.fields import DropError
from lora_llava.data.convert.writer import Picture

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of the image."""

_SLACK = 1.0
"""Pixels by which an annotation may exceed the image; tools round to either side of the border."""
_OUTSIDE = "a box is outside of its image"


def corners(left: float, top: float, width: float, height: float) -> Box:
    """Return the corners of a box that is given by a corner and its size."""
    return left, top, left + width, top + height


def clipped(box: Box, size: tuple[int, int], where: str) -> Box:
    """Return a box clipped to an image of `size` (width, height).

    Raises DropError if it is empty, exceeds the image by more than a pixel, or lies outside of it.
    """
    left, top, right, bottom = box
    width, height = size
    if right <= left or bottom <= top:
        raise DropError(f"{where}: is {_shown(box)}: its right and bottom must exceed left and top", "a box is empty")
    if left < -_SLACK or top < -_SLACK or right > width + _SLACK or bottom > height + _SLACK:
        raise DropError(f"{where}: is {_shown(box)}, outside of the image of {width} x {height} pixels", _OUTSIDE)
    left, top, right, bottom = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
    # A thin box within the slack has nothing left on the image.
    if right <= left or bottom <= top:
        raise DropError(f"{where}: is {_shown(box)}, outside of the image of {width} x {height} pixels", _OUTSIDE)
    return left, top, right, bottom


def check_size(picture: Picture, recorded: tuple[float, float] | None, where: str) -> None:
    """Raise DropError if coordinates refer to an image of another size, or to one before its rotation by EXIF data.

    `recorded`: width and height in pixels that the annotations name; None if they name none.
    """
    if recorded is not None and recorded != picture.size:
        raise DropError(
            f"{where}: the annotations are of an image of {recorded[0]:g} x {recorded[1]:g} pixels, the file has "
            f"{picture.size[0]} x {picture.size[1]}",
            "an image has another size than its annotations say",
        )
    # With width and height exchanged, the recorded size shows which form is meant.
    is_known = picture.orientation > 4 and recorded is not None and picture.size[0] != picture.size[1]
    if picture.orientation > 1 and not is_known:
        raise DropError(
            f"{where}: the image is rotated by its EXIF data, and the boxes may be of either form",
            "boxes in an image that EXIF data rotate",
        )


def llava_box(box: Box, size: tuple[int, int], where: str) -> str:
    """Return a box as text: `[x1, y1, x2, y2]`, each from 0 to 1 with two decimals.

    Relative to the image of `size` (width, height) centered on a square, as `image_aspect_ratio: pad` shows it. Raises
    DropError if nothing of the box is left at two decimals, or it is outside of the image.
    """
    left, top, right, bottom = clipped(box, size, where)
    side = max(size)
    # Whole pixels: the padding of an odd difference is smaller on the left and at the top.
    across, down = (side - size[0]) // 2, (side - size[1]) // 2
    shown = [
        f"{(value + pad) / side:.2f}" for value, pad in zip((left, top, right, bottom), (across, down) * 2, strict=True)
    ]
    if shown[0] == shown[2] or shown[1] == shown[3]:
        raise DropError(
            f"{where}: is {_shown(box)}, narrower than a hundredth of the image of {size[0]} x {size[1]} pixels",
            "a box is too small for two decimals",
        )
    return f"[{', '.join(shown)}]"


def _shown(box: Box) -> str:
    return f"({', '.join(f'{value:.6g}' for value in box)})"
