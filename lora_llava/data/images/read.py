"""Open images safely, and preprocess them as LLaVA-1.5 does in training."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from lora_llava.data.images.grayscale import Window, to_eight_bits
from lora_llava.data.images.tiff import check_tiles, is_tiff, shows_low_as_white
from lora_llava.data.record import ImageSource
from lora_llava.errors import DataError

if TYPE_CHECKING:
    import torch

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Allowed decoders; the name of a file does not matter."""
MAX_PIXELS = 64_000_000
"""Maximum number of pixels, by the header; checked before anything is decoded."""
MAX_BYTES = 512 * 2**20
"""Largest image file; MAX_PIXELS at 16 bits per channel take less, even poorly compressed."""
_BAD = "bad_image"
"""Kind of the errors of this module."""

DEEP_GRAY = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
"""Pillow's modes of more than 8 bits per pixel; of color images it keeps only the upper 8 bits."""
_RESCALE = 1 / 255
_ORIENTATION = 0x0112
"""EXIF tag."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation: what makes the image upright."""
_DICOM_MARK = slice(128, 132)
"""Where a DICOM file has the letters DICM."""
_HEIF_MARK = slice(4, 8)
"""Where HEIC and AVIF files have the letters ftyp, as videos do."""


def open_image(source: ImageSource) -> Image.Image:
    """Decode an image as RGB, upright by its EXIF data; of an animation or a TIFF, the first frame or page.

    Grayscale of more than 8 bits becomes 8 bits by `source.window`, see `to_eight_bits`. Raises DataError naming the
    image if it is missing, too large, damaged, or of another format.
    """
    return decode_image(read_image(source), source.name, window=source.window)


def image_problem(source: ImageSource) -> DataError | None:
    """Return the error of `open_image`; None if the image can be opened."""
    try:
        open_image(source)
    except DataError as error:
        return error
    return None


def read_image(source: ImageSource) -> bytes:
    """Read the bytes of an image; DataError naming it if it is missing, empty or too large."""
    name = source.name
    try:
        if source.path is not None and source.path.exists() and not source.path.is_file():
            raise DataError(f"{name}: not a regular file; give an image file", _BAD)
        if source.path is not None and (size := source.path.stat().st_size) > MAX_BYTES:
            raise DataError(f"{name}: {size:,} bytes, at most {MAX_BYTES:,} are read; make it smaller", _BAD)
        data = source.embedded() if source.path is None else source.path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{name}: the image cannot be read: {error.strerror}; restore it or leave it out", _BAD
        ) from None
    if not data:
        raise DataError(f"{name}: the image is empty; restore it or leave it out", _BAD)
    return data


def decode_image(data: bytes, name: str, *, window: Window | None = None) -> Image.Image:
    """Decode the bytes of an image as `open_image` does; `name` is the prefix of its messages."""
    try:
        # Pillow's size limit is checked below, with ours; its other warnings are about metadata.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return _decode(image, name, window)
    except DataError:
        raise
    except UnidentifiedImageError:
        if is_tiff(data):
            raise DataError(
                f"{name}: a TIFF that is damaged, or has pixels that are not read, such as several bands of 16 bits; "
                "save it as 8-bit RGB or as 16-bit gray",
                _BAD,
            ) from None
        if data[_DICOM_MARK] == b"DICM":
            raise DataError(
                f"{name}: a DICOM file, which is not read; have it converted with its table: lora-llava convert dicom, "
                "or save it as PNG or TIFF of 16-bit gray (docs/convert.md)",
                _BAD,
            ) from None
        if data[_HEIF_MARK] == b"ftyp":
            raise DataError(f"{name}: a HEIC or AVIF file, as phones write them; save it as JPEG", _BAD) from None
        allowed = ", ".join(FORMATS)
        raise DataError(f"{name}: not an image of a known format; allowed are {allowed}: save it so", _BAD) from None
    except Image.DecompressionBombError:
        raise DataError(f"{name}: far more than {MAX_PIXELS:,} pixels; make it smaller", _BAD) from None
    except Exception as error:  # noqa: BLE001 - a decoder raises anything for broken bytes
        # Without the text of the error, which can contain memory addresses.
        raise DataError(
            f"{name}: the image is truncated or damaged ({type(error).__name__}); restore it or leave it out",
            _BAD,
        ) from None


def _decode(image: Image.Image, name: str, window: Window | None) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: {width:,} x {height:,} pixels, at most {MAX_PIXELS:,} are allowed; make it smaller", _BAD
        )
    check_tiles(image, name)
    image.load()
    turn = _TURNS.get(orientation_of(image))
    upright = image if turn is None else image.transpose(turn)
    if upright.mode in DEEP_GRAY:
        # convert("RGB") would clip every value above 255 to white.
        gray = to_eight_bits(np.asarray(upright), window)
        return Image.fromarray(255 - gray if shows_low_as_white(image) else gray).convert("RGB")
    return upright.convert("RGB")


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 to 8; 1 if its metadata are damaged."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # noqa: BLE001 - the parser raises anything for broken metadata
        return 1
    return orientation if isinstance(orientation, int) and orientation in _TURNS else 1


def preprocess(
    image: Image.Image, *, size: int, mean: Sequence[float], std: Sequence[float], aspect_ratio: str
) -> torch.Tensor:
    """Return an RGB image as `pixel_values` (3, size, size) fp32, normalized by `mean` (3,) and `std` (3,).

    `pad` first centers it on a square of the mean color, as LLaVA-1.5's second stage does; `square` resizes its
    shorter side to `size` and crops the center, as its first stage and CLIP do. Raises ValueError for others.
    """
    if aspect_ratio == "pad":
        resized = _pad_to_square(image, size, mean).resize((size, size), Image.Resampling.BICUBIC)
    elif aspect_ratio == "square":
        resized = _resize_and_crop(image, size)
    else:
        raise ValueError(f"aspect_ratio is {aspect_ratio!r}, must be 'pad' or 'square'")
    # Imported here: processes that only decode images do not need it.
    import torch

    # Same order and dtypes as CLIP's processor: rescale in double precision, normalize in single precision.
    pixels = (np.asarray(resized).astype(np.float64) * _RESCALE).astype(np.float32)
    normalized = (pixels - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(normalized.transpose(2, 0, 1)))


def mean_color(size: int, mean: Sequence[float]) -> Image.Image:
    """Return a blank image (size, size) of the mean color, which is also the color of padding."""
    return Image.new("RGB", (size, size), _color(mean))


def _color(mean: Sequence[float]) -> tuple[int, ...]:
    return tuple(int(channel * 255) for channel in mean)


def _pad_to_square(image: Image.Image, size: int, mean: Sequence[float]) -> Image.Image:
    """LLaVA's `expand2square`.

    Known deviation: if the square would exceed MAX_PIXELS, the image is resized before padding, not after.
    """
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    if side * side > MAX_PIXELS:
        scale = 8 * size / side
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        side = max(width, height)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side), _color(mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` and crop the center, as CLIP does."""
    width, height = image.size
    new_long = int(size * max(width, height) / min(width, height))
    new_width, new_height = (size, new_long) if width <= height else (new_long, size)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    if new_width * new_height > MAX_PIXELS:
        # Resize only what the crop keeps: a line of 60,000 pixels would otherwise become 20 million by 336.
        across, down = width / new_width, height / new_height
        box = (left * across, top * down, (left + size) * across, (top + size) * down)
        return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    resized = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))
