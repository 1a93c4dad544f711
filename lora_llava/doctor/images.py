"""What is to be known of an image: its bytes' hash, its size, and a fingerprint of what it shows."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from lora_llava.data.images.grayscale import LEVELS_PER_STRAY
from lora_llava.data.images.read import DEEP_GREY, FORMATS, decode_image, read_image
from lora_llava.data.record import ImageSource
from lora_llava.errors import DataError

MOST_DIFFERING_BITS = 8
"""Of the 64 of two fingerprints, for images that may show the same."""
MOST_COLOUR_DIFFERENCE = 10
"""Of 255, in any of the 8 x 8 fields of two images that show the same."""

MAX_BLANK_RANGE = 2
"""Of 255: darkest to brightest, in each channel of an image that shows nothing."""

_PNG_DEPTH = 24
"""Byte of a PNG that holds the bits of a channel."""
_FIELDS = 8
_BLOCK = 64


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What was found when an image was opened; without `error` all of it is known."""

    error: DataError | None = None
    sha256: bytes = b""
    width: int = 0
    height: int = 0
    is_transparent: bool = False
    dhash: int = 0
    """64 bits: whether each of 8 x 8 fields is darker than the one to its right."""
    colours: bytes = b""
    """Mean RGB of 8 x 8 fields."""
    contrast: int = 255
    """Darkest to brightest, in the channel where they are farthest apart; 0 if all of it is one color."""
    levels: int = 256
    """Values of a channel that are left of an image of more than 8 bits, if more than strays were lost; else 256."""


def look_at_image(source: ImageSource) -> ImageFacts:
    """Open an image as training does, and describe it; what is wrong with it is in `error`."""
    try:
        data = read_image(source)
        image = decode_image(data, source.name, window=source.window)
    except DataError as error:
        return ImageFacts(error)
    return ImageFacts(
        None,
        hashlib.sha256(data).digest(),
        image.width,
        image.height,
        _is_transparent(data),
        difference_hash(image),
        image.resize((_FIELDS, _FIELDS), Image.Resampling.BOX).tobytes(),
        _contrast(image),
        _levels_left(data, image),
    )


def difference_hash(image: Image.Image) -> int:
    """Return the difference hash (dHash) of an image: 64 bits that scaling and recompressing hardly change."""
    grey = np.asarray(image.convert("L").resize((_FIELDS + 1, _FIELDS), Image.Resampling.BOX))
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def _histogram(image: Image.Image) -> npt.NDArray[np.int64]:
    """Count the values of each channel (3, 256)."""
    return np.array(image.histogram(), dtype=np.int64).reshape(3, 256)


def _contrast(image: Image.Image) -> int:
    """Return how far apart the darkest and brightest values of a channel are."""
    return max(int(np.ptp(np.flatnonzero(channel))) for channel in _histogram(image))


def _levels_left(data: bytes, image: Image.Image) -> int:
    """Count the values of a channel in the 8 bits of a deeper image; 256 if it is not deeper or lost hardly any."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=FORMATS) as original:
            is_deep_grey = original.mode in DEEP_GREY
            if not is_deep_grey and not (original.format == "PNG" and data[_PNG_DEPTH] == 16):
                return 256
            left = int((_histogram(image) > 0).sum(axis=1).max())
            # Of deep color only the upper 8 bits can be had, so what was lost is not known.
            lost = len(np.unique(np.asarray(original))) - left if is_deep_grey else left
            # Padding and markers are left out of the range on purpose.
            return left if lost * LEVELS_PER_STRAY > left else 256


def _is_transparent(data: bytes) -> bool:
    """Tell whether any pixel of an image that is known to decode lets through what is below it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
                return False
            try:
                return bool(np.asarray(image.convert("RGBA").getchannel("A")).min() < 255)
            except ValueError:
                # Grey of 16 bits has no way to RGBA.
                return False


def near_pairs(asked: list[ImageFacts], known: list[ImageFacts]) -> list[tuple[int, int]]:
    """Pair each image of `asked` with the most similar of `known`, where they nearly show the same.

    Returns indices into both; images of equal bytes are no pair.
    """
    if not asked or not known:
        return []
    hashes = np.array([one.dhash for one in known], dtype=np.uint64)
    colours = np.frombuffer(b"".join(one.colours for one in known), np.uint8).reshape(len(known), -1).astype(np.int16)
    pairs = []
    for start in range(0, len(asked), _BLOCK):
        block = asked[start : start + _BLOCK]
        ours = np.array([one.dhash for one in block], dtype=np.uint64)
        near = np.bitwise_count(ours[:, None] ^ hashes[None, :]) <= MOST_DIFFERING_BITS
        for place, one in enumerate(block):
            candidates = np.flatnonzero(near[place])
            if not len(candidates):
                continue
            own = np.frombuffer(one.colours, np.uint8).astype(np.int16)
            distance = np.abs(colours[candidates] - own).max(axis=1)
            for candidate in candidates[np.argsort(distance, kind="stable")]:
                if np.abs(colours[candidate] - own).max() > MOST_COLOUR_DIFFERENCE:
                    break
                if known[candidate].sha256 != one.sha256:
                    pairs.append((start + place, int(candidate)))
                    break
    return pairs
