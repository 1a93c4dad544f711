"""Whether an image can be opened, found out from its header and its end: a thousandth of the time of decoding it."""

from __future__ import annotations

import io
import warnings
from typing import BinaryIO

from PIL import Image

from lora_llava.data.images.read import FORMATS, MAX_BYTES, MAX_PIXELS, open_image, read_image
from lora_llava.data.record import ImageSource

_TAIL = 16
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}
"""What a whole file of a format ends with; some that have more behind it are whole too."""


def check_header(source: ImageSource) -> None:
    """Raise DataError as `open_image` does for a file that is none, or cut off; damage in its middle is not seen.

    A file whose header or end is not as usual is decoded whole, which decides.
    """
    if not _looks_whole(source):
        open_image(source)


def _looks_whole(source: ImageSource) -> bool:
    try:
        with source.path.open("rb") if source.path is not None else io.BytesIO(read_image(source)) as handle:
            size = handle.seek(0, io.SEEK_END)
            handle.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(handle, formats=FORMATS) as image:
                    width, height = image.size
                    known = image.format
            return size <= MAX_BYTES and width * height <= MAX_PIXELS and _ends_well(handle, size, str(known))
    # Whatever a decoder that is given broken bytes raises: `open_image` has the words for it.
    except Exception:  # noqa: BLE001
        return False


def _ends_well(handle: BinaryIO, size: int, known: str) -> bool:
    if known in _ENDS:
        handle.seek(max(0, size - _TAIL))
        return handle.read(_TAIL).endswith(_ENDS[known])
    handle.seek(0)
    head = handle.read(_TAIL)
    if known == "WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= size
    return known == "BMP" and int.from_bytes(head[2:6], "little") == size
