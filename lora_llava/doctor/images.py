"""What is to be known of an image: its bytes' hash, its size, and a fingerprint of what it shows."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lora_llava.data.images import FORMATS, decode_image, read_image
from lora_llava.data.sources import ImageSource
from lora_llava.errors import DataError

MOST_DIFFERING_BITS = 8
"""Of the 64 of two fingerprints, for images that may show the same."""
MOST_COLOUR_DIFFERENCE = 10
"""Of 255, in any of the 8 x 8 fields of two images that show the same."""

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


def look_at_image(source: ImageSource) -> ImageFacts:
    """Open an image as training does, and describe it; what is wrong with it is in `error`."""
    try:
        data = read_image(source)
        image = decode_image(data, source.name)
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
    )


def difference_hash(image: Image.Image) -> int:
    """Return the difference hash (dHash) of an image: 64 bits that scaling and recompressing hardly change."""
    grey = np.asarray(image.convert("L").resize((_FIELDS + 1, _FIELDS), Image.Resampling.BOX))
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


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
