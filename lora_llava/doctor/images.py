"""Properties of an image: hash of its bytes, size, contrast, and a perceptual hash."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from lora_llava.data.images.grayscale import LEVELS_PER_STRAY
from lora_llava.data.images.read import DEEP_GRAY, FORMATS, decode_image, read_image
from lora_llava.data.images.tiff import bits_per_channel
from lora_llava.data.record import ImageSource
from lora_llava.data.sources.stored.ranges import StoredBytes
from lora_llava.errors import DataError

_MAX_DIFFERING_BITS = 8
"""Bits, of 64, in which the hashes of near duplicates may differ."""
_MAX_COLOR_DIFFERENCE = 10
"""Largest difference of near duplicates, of 255, in any of 8 x 8 cells."""

MAX_BLANK_RANGE = 2
"""Largest range of values, of 255, in each channel of a blank image."""

NEARLY = 15
"""Nearly black: no usual value above it; nearly white: none below 255 minus it. 12 bits shifted by 8 end there."""
_RARE = 0.0005
"""Share of pixels at each end that are not usual: a line of text on a page is more."""

_PNG_DEPTH = 24
"""Byte of a PNG that holds the bits of a channel."""
_CELLS = 8
_BLOCK = 64
"""Images that are compared at once."""
_VALUES = 8
"""Values of many images that are compared at once."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Properties of an opened image; if `error` is None, all are known."""

    error: DataError | None = None
    sha256: bytes = b""
    width: int = 0
    height: int = 0
    is_transparent: bool = False
    dhash: int = 0
    """64 bits: whether each of 8 x 8 cells is darker than the one to its right."""
    colors: bytes = b""
    """Mean RGB of 8 x 8 cells."""
    contrast: int = 255
    """Largest range of values in a channel; 0 for an image of one color."""
    usual: tuple[int, int, int] = (0, 255, 255)
    """Lowest and highest value in any channel, and largest range of a channel, without the rarest at each end."""
    levels: int = 256
    """Distinct values left in a channel of an image of more than 8 bits, if that lost more than strays; else 256."""
    deep: tuple[float, float] | None = None
    """Lowest and highest value of a gray image of more than 8 bits; None for others."""


def look_at_image(source: ImageSource) -> ImageFacts:
    """Open an image as training does and describe it; `error` says why if it cannot be used."""
    try:
        data = read_image(source)
        image = decode_image(data, source.name, window=source.window)
    except DataError as error:
        return ImageFacts(error)
    histogram = np.array(image.histogram(), dtype=np.int64).reshape(3, 256)
    return ImageFacts(
        None,
        # The key of a stored image is this hash.
        bytes.fromhex(source.key) if isinstance(source.data, StoredBytes) else hashlib.sha256(data).digest(),
        image.width,
        image.height,
        _is_transparent(data),
        _difference_hash(image),
        image.resize((_CELLS, _CELLS), Image.Resampling.BOX).tobytes(),
        _contrast(histogram),
        _usual_values(histogram),
        *_deep_gray(data, histogram),
    )


def _difference_hash(image: Image.Image) -> int:
    """Return the difference hash (dHash) of an image: 64 bits that scaling and recompressing hardly change."""
    gray = np.asarray(image.convert("L").resize((_CELLS + 1, _CELLS), Image.Resampling.BOX))
    return int.from_bytes(np.packbits(gray[:, 1:] > gray[:, :-1]).tobytes(), "big")


def _contrast(histogram: npt.NDArray[np.int64]) -> int:
    """Return the largest range of values in a channel, from the histogram (3, 256)."""
    return max(int(np.ptp(np.flatnonzero(channel))) for channel in histogram)


def _usual_values(histogram: npt.NDArray[np.int64]) -> tuple[int, int, int]:
    """Return lowest and highest value in any channel and largest range of one, without the rarest at each end.

    `histogram`: of each channel, (3, 256).
    """
    counts = histogram.cumsum(axis=1)
    rare = _RARE * counts[0, -1]
    lows = (counts > rare).argmax(axis=1)
    highs = (counts >= counts[:, -1:] - rare).argmax(axis=1)
    return int(lows.min()), int(highs.max()), int((highs - lows).max())


def _deep_gray(data: bytes, histogram: npt.NDArray[np.int64]) -> tuple[int, tuple[float, float] | None]:
    """Return `ImageFacts.levels` and `ImageFacts.deep` of an image.

    `data`: the file; `histogram`: of the decoded image of 8 bits, (3, 256).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=FORMATS) as original:
            is_deep_gray = original.mode in DEEP_GRAY
            if not is_deep_gray and _bits_per_channel(original, data) <= 8:
                return 256, None
            left = int((histogram > 0).sum(axis=1).max())
            if not is_deep_gray:
                # Pillow reads only the upper 8 bits of deep color, so the loss is unknown.
                return left, None
            values = np.unique(np.asarray(original))
            values = values[np.isfinite(values)]
            span = (float(values[0]), float(values[-1])) if len(values) else None
            # Losing padding and markers is intended.
            return left if (len(values) - left) * LEVELS_PER_STRAY > left else 256, span


def _bits_per_channel(image: Image.Image, data: bytes) -> int:
    """Return the bits of a channel in the file, of which Pillow keeps 8 in color images."""
    if image.format == "TIFF":
        return bits_per_channel(image)
    return data[_PNG_DEPTH] if image.format == "PNG" else 8


def _is_transparent(data: bytes) -> bool:
    """Return whether any pixel of a decodable image is transparent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
                return False
            try:
                return bool(np.asarray(image.convert("RGBA").getchannel("A")).min() < 255)
            except ValueError:
                # Pillow cannot convert 16-bit grayscale to RGBA.
                return False


def near_pairs(asked: list[ImageFacts], known: list[ImageFacts]) -> list[tuple[int, int]]:
    """Pair each image of `asked` with its nearest duplicate in `known`, if there is one.

    Returns pairs of indices into both; images with equal bytes are not paired.
    """
    if not asked or not known:
        return []
    different = _different(known)
    hashes = np.array([known[index].dhash for index in different], dtype=np.uint64)
    joined = b"".join(known[index].colors for index in different)
    colors = np.ascontiguousarray(np.frombuffer(joined, np.uint8).reshape(len(different), -1).T.astype(np.int16))
    middle = colors.mean(axis=1)
    of_bytes: dict[bytes, list[int]] = {}
    for position, index in enumerate(different):
        of_bytes.setdefault(known[index].sha256, []).append(position)
    pairs = []
    for start in range(0, len(asked), _BLOCK):
        block = asked[start : start + _BLOCK]
        ours = np.array([facts.dhash for facts in block], dtype=np.uint64)
        near = np.bitwise_count(ours[:, None] ^ hashes[None, :]) <= _MAX_DIFFERING_BITS
        for offset, facts in enumerate(block):
            near[offset, of_bytes.get(facts.sha256, [])] = False
            own = np.frombuffer(facts.colors, np.uint8).astype(np.int16)
            if (nearest := _nearest(own, colors, np.flatnonzero(near[offset]), middle)) is not None:
                pairs.append((start + offset, different[nearest]))
    return pairs


def _different(known: list[ImageFacts]) -> list[int]:
    """Return the indices of the images that can be nearest: of those that look equal, the first two of other bytes."""
    seen: dict[tuple[int, bytes], set[bytes]] = {}
    kept = []
    for index, facts in enumerate(known):
        contents = seen.setdefault((facts.dhash, facts.colors), set())
        if len(contents) < 2 and facts.sha256 not in contents:
            contents.add(facts.sha256)
            kept.append(index)
    return kept


def _nearest(
    own: npt.NDArray[np.int16],
    colors: npt.NDArray[np.int16],
    candidates: npt.NDArray[np.intp],
    middle: npt.NDArray[np.float64],
) -> int | None:
    """Return the first candidate with the smallest difference in color; None if none is a near duplicate.

    `own`: values of an image, (192,); `colors`: of all known ones, (192, known); `middle`: their means, (192,).
    Thousands of images may be alike: they are compared in growing parts, and by some values after the other while many
    may be nearer.
    """
    if not len(candidates):
        return None
    # The values that are least usual tell the image from most others.
    telling = np.argsort(-np.abs(own - middle), kind="stable").reshape(-1, _VALUES, 1)
    smallest, nearest = _MAX_COLOR_DIFFERENCE + 1, None
    start, size = 0, _BLOCK
    while start < len(candidates) and smallest > 0:
        left = candidates[start : start + size]
        for values in telling:
            if len(left) <= _BLOCK:
                break
            left = left[np.abs(colors[values, left] - own[values]).max(axis=0) < smallest]
        differences = np.abs(colors[:, left] - own[:, None]).max(axis=0)
        if len(left) and differences.min() < smallest:
            smallest, nearest = int(differences.min()), int(left[differences.argmin()])
        start, size = start + size, 2 * size
    return nearest
