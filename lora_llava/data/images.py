"""Images from strangers, decoded safely, and turned into what the vision tower was trained on."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from lora_llava.data.records import ImageSource
from lora_llava.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""Formats that are read; of an animation, the first frame."""
MAX_PIXELS = 64_000_000
"""Largest image that is decoded; its size is read from the header first."""

_SIXTEEN_BIT = {"I;16", "I;16L", "I;16B", "I"}


def open_image(source: ImageSource) -> Image.Image:
    """Decode an image: upright by its EXIF data, RGB.

    Raises DataError, naming the image, if it cannot be read, is no image of a known format, is damaged, or is
    larger than MAX_PIXELS.
    """
    try:
        stream = io.BytesIO(source.data) if source.data is not None else _path(source).open("rb")
        with stream, Image.open(stream, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"image {source.key}: {image.width} x {image.height} pixels, at most {MAX_PIXELS:,} are decoded; "
                    "scale it down"
                )
            return _upright_rgb(image)
    except UnidentifiedImageError as error:
        raise DataError(f"image {source.key}: not an image of a known format ({', '.join(FORMATS)})") from error
    except FileNotFoundError as error:
        raise DataError(f"image {source.key}: no such file") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"image {source.key}: damaged or cut off; it cannot be decoded") from error


def _path(source: ImageSource) -> Path:
    assert source.path is not None
    return source.path


def _upright_rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode in _SIXTEEN_BIT:
        # PIL would clip 16-bit greys at 255 instead of scaling them.
        grey = np.asarray(upright, dtype=np.float64) / 257.0
        upright = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    elif upright.mode == "P":
        upright = upright.convert("RGBA")
    return upright.convert("RGB")


def preprocess(
    image: Image.Image, *, size: int, mean: tuple[float, ...], std: tuple[float, ...], aspect_ratio: str
) -> torch.Tensor:
    """Turn an RGB image into `pixel_values` (3, size, size), fp32.

    `pad` puts it on a square of the mean colour first (LLaVA-1.5's expand2square), `square` resizes its shorter
    side and cuts the middle out (CLIP's own way); then rescaled and normalised.
    """
    if aspect_ratio == "pad":
        image = expand_to_square(image, mean)
    short = min(image.size)
    target = (max(size, int(size * image.width / short)), max(size, int(size * image.height / short)))
    if image.size != target:
        image = image.resize(target, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255.0
    values: torch.Tensor = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    return values.contiguous()


def expand_to_square(image: Image.Image, mean: tuple[float, ...]) -> Image.Image:
    """Put an image in the middle of a square of the mean colour."""
    side = max(image.size)
    if image.width == image.height:
        return image
    square = mean_colour(side, mean)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def mean_colour(size: int, mean: tuple[float, ...]) -> Image.Image:
    """Make a square of the mean colour alone: an image that says nothing."""
    red, green, blue = (int(value * 255) for value in mean)
    return Image.new("RGB", (size, size), (red, green, blue))
