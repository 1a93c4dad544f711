"""The image decoder: bytes become an upright RGB image within bounds, or an error that names the image."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from PIL import Image

from lora_llava.data.images.read import MAX_PIXELS, open_image, preprocess
from lora_llava.data.record import ImageSource
from lora_llava.doctor.images import look_at_image
from lora_llava.errors import DataError
from tests.fuzz.mutations import changed_bytes
from tests.helpers.faulty import encoded, scene


def originals() -> list[bytes]:
    image = scene(0, 24)
    frames = [scene(seed, 12) for seed in (1, 2)]
    grey = Image.fromarray(np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8))
    exif = image.getexif()
    exif[0x0112] = 6
    made = [encoded(image, form) for form in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")]
    made += [encoded(image, "JPEG", exif=exif, progressive=True), encoded(image.convert("CMYK"), "JPEG")]
    made += [encoded(frames[0], form, save_all=True, append_images=frames[1:]) for form in ("GIF", "WEBP", "PNG")]
    made += [encoded(image.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGBA")]
    return [*made, encoded(grey, "PNG"), encoded(image.convert("P"), "PNG", transparency=bytes([0, 99]))]


@pytest.mark.fault("images: a decompression bomb")
@given(data=changed_bytes(originals()))
def test_changed_images(data: bytes) -> None:
    source = ImageSource("0123456789abcdef", None, data, "train.json, record 1")
    try:
        image = open_image(source)
    except DataError as error:
        assert str(error).startswith("train.json, record 1, image embedded image 0123456789ab: ")
        assert "0x" not in str(error)
        assert look_at_image(source).error is not None
        return
    assert image.mode == "RGB"
    assert 0 < image.width * image.height <= MAX_PIXELS
    facts = look_at_image(source)
    assert (facts.error, facts.width, facts.height) == (None, image.width, image.height)
    for aspect_ratio in ("pad", "square"):
        pixels = preprocess(image, size=28, mean=(0.5, 0.5, 0.5), std=(0.3, 0.3, 0.3), aspect_ratio=aspect_ratio)
        assert pixels.shape == (3, 28, 28)
        assert bool(pixels.isfinite().all())
