"""What TIFF files need more than other formats: bounds on their tiles, and their inverted grays.

Pillow applies the rotation of a TIFF when it loads it, and reads the first page alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image

from lora_llava.errors import DataError

_MAX_TILE_PIXELS = 64_000_000
"""Most pixels of a tile, which is decoded as a whole, however small the image is."""
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
_BITS_PER_SAMPLE = 258
_OFFSETS_AND_LENGTHS = ((273, 279), (324, 325))
"""Tags with the positions and lengths of strips, and of tiles."""
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def is_tiff(data: bytes) -> bool:
    """Tell a TIFF or BigTIFF by its first bytes."""
    return data.startswith(_STARTS)


def check_tiles(image: Image.Image, name: str) -> None:
    """Raise DataError for a TIFF with tiles far larger than images may be; `name` is the prefix of its message."""
    width, height = _tile_size(image)
    if width * height > _MAX_TILE_PIXELS:
        raise DataError(
            f"{name}: tiles of {width:,} x {height:,} pixels, at most {_MAX_TILE_PIXELS:,} are allowed; save it in "
            "smaller tiles, or in strips",
            "bad_image",
        )


def shows_low_as_white(image: Image.Image) -> bool:
    """Tell whether a gray image stores white as its lowest value, as many scans do. Pillow inverts only 8 bits."""
    return image.format == "TIFF" and image.getexif().get(_PHOTOMETRIC) == _WHITE_IS_ZERO


def bits_per_channel(image: Image.Image) -> int:
    """Return the most bits of a channel of a TIFF."""
    return max(_integers(image, _BITS_PER_SAMPLE), default=1)


def is_complete(image: Image.Image, size: int) -> bool:
    """Tell whether all strips or tiles of a TIFF end within its `size` bytes, and are no larger than allowed."""
    width, height = _tile_size(image)
    if width * height > _MAX_TILE_PIXELS:
        return False
    for offsets, lengths in _OFFSETS_AND_LENGTHS:
        starts, counts = _integers(image, offsets), _integers(image, lengths)
        if starts:
            return len(starts) == len(counts) and all(
                start > 0 and count > 0 and start + count <= size for start, count in zip(starts, counts, strict=True)
            )
    return False


def _tile_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of a TIFF's tiles; zeros for strips and for other formats."""
    if image.format != "TIFF":
        return 0, 0
    width, height = (next(iter(_integers(image, tag)), 0) for tag in (_TILE_WIDTH, _TILE_LENGTH))
    return width, height


def _integers(image: Image.Image, tag: int) -> list[int]:
    value = image.getexif().get(tag)
    values: Iterable[object] = value if isinstance(value, tuple) else (value,)
    return [number for number in values if isinstance(number, int)]
