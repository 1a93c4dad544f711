"""Images: opened safely, and what is refused."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lora_llava.data.images import read as images
from lora_llava.data.images.read import mean_color, open_image, preprocess
from lora_llava.data.record import ImageSource
from lora_llava.errors import DataError

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
RED = (200, 30, 10)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def embedded(data: bytes) -> ImageSource:
    return ImageSource("0123456789abcdef", None, data, "train.json, record 4 (id x)")


def refused(data: bytes) -> str:
    with pytest.raises(DataError) as caught:
        open_image(embedded(data))
    message = str(caught.value)
    assert message.startswith("train.json, record 4 (id x), image embedded image 0123456789ab: ")
    assert "0x" not in message
    return message


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_allowed_formats_become_rgb(form: str) -> None:
    image = open_image(embedded(saved(Image.new("RGB", (6, 5), RED), form)))
    assert (image.mode, image.size) == ("RGB", (6, 5))
    assert np.abs(np.asarray(image).astype(int) - RED).max() <= 12


@pytest.mark.fault("images: PSD, FITS, EPS, SVG and other formats")
@pytest.mark.parametrize("form", ["PPM", "ICO", "TGA", "PCX", "SGI", "PDF"])
def test_other_formats_are_refused(form: str) -> None:
    message = refused(saved(Image.new("RGB", (16, 16), RED), form))
    assert "not an image of a known format; allowed are JPEG, PNG, WEBP, BMP, GIF, TIFF" in message


def test_a_dicom_file_is_called_one() -> None:
    assert "a DICOM file, which is not read; have it converted with" in refused(bytes(128) + b"DICM" + bytes(64))
    assert "not an image of a known format" in refused(bytes(127) + b"DICM" + bytes(64))


def test_a_photo_of_a_phone_is_called_one() -> None:
    assert "a HEIC or AVIF file, as phones write them; save it as JPEG" in refused(b"\0\0\0\x18ftypheic" + bytes(64))


@pytest.mark.fault("images: a web page saved as .jpg")
def test_a_file_is_judged_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "page.jpg"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match=r"page\.jpg: not an image of a known format"):
        open_image(ImageSource("page.jpg", path, None))
    path.write_bytes(saved(Image.new("RGB", (2, 2), RED), "PNG"))
    assert open_image(ImageSource("page.jpg", path, None)).getpixel((0, 0)) == RED


@pytest.mark.fault("images: an empty file")
def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png: the image cannot be read: No such file"):
        open_image(ImageSource("gone.png", tmp_path / "gone.png", None))
    (tmp_path / "empty.png").touch()
    with pytest.raises(DataError, match=r"empty\.png: the image is empty"):
        open_image(ImageSource("empty.png", tmp_path / "empty.png", None))


@pytest.mark.fault("images: a truncated JPEG")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncated_image_is_refused(form: str) -> None:
    generator = np.random.default_rng(0)
    data = saved(Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)), form)
    assert "truncated or damaged" in refused(data[: len(data) // 2])


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.fault("images: a decompression bomb")
def test_size_is_bounded_before_anything_is_decoded() -> None:
    assert "8,001 x 8,000 pixels, at most 64,000,000" in refused(png_claiming(8001, 8000))
    assert "9,500 x 9,500 pixels" in refused(png_claiming(9500, 9500))
    assert "far more than 64,000,000 pixels" in refused(png_claiming(30_000, 30_000))


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (4, 2), RED)
    exif = image.getexif()
    exif[0x0112] = 6
    assert open_image(embedded(saved(image, "JPEG", exif=exif))).size == (2, 4)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), (0, 0, 255))]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(embedded(data)).getpixel((0, 0)) == RED


@pytest.mark.fault("images: 1 x 1 pixel, extreme shapes, transparency, CMYK, 16 bits, animations, EXIF rotation")
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = Image.new("RGB", (3, 3), (255, 255, 255)).convert(mode)
    options = {"transparency": 0} if mode == "P" else {}
    opened = open_image(embedded(saved(image, "JPEG" if mode == "CMYK" else "PNG", **options)))
    assert opened.mode == "RGB"
    assert opened.getpixel((1, 1)) == (255, 255, 255)


def test_palette_with_transparency_by_bytes_keeps_its_colours() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, 0, 255])
    image.putpixel((1, 0), 1)
    opened = open_image(embedded(saved(image, "PNG", transparency=bytes([0, 128]))))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [RED, (0, 0, 255)]


def test_mean_color_is_llavas_and_all_but_zero_once_normalised() -> None:
    image = mean_color(28, MEAN)
    assert image.size == (28, 28)
    assert image.getpixel((0, 0)) == (122, 116, 104)
    assert preprocess(image, size=28, mean=MEAN, std=STD, aspect_ratio="pad").abs().max() < 0.02


def test_very_long_image_is_padded_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (400, 100), RED)
    exact = preprocess(image, size=28, mean=MEAN, std=STD, aspect_ratio="pad")
    monkeypatch.setattr(images, "MAX_PIXELS", 300 * 300)
    bounded = preprocess(image, size=28, mean=MEAN, std=STD, aspect_ratio="pad")
    # Equal but at the border of the image, which falls on another fraction of a pixel.
    assert (exact - bounded).abs().mean() < 0.02
    torch.testing.assert_close(bounded[:, 14], exact[:, 14])


def test_unknown_aspect_ratio_is_refused() -> None:
    with pytest.raises(ValueError, match="'anyres', must be 'pad' or 'square'"):
        preprocess(mean_color(4, MEAN), size=4, mean=MEAN, std=STD, aspect_ratio="anyres")
