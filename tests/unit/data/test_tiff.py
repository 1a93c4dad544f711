"""TIFF images: the first page, 8 and 16 bits, inverted grays, and files that would take memory or time without end."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, TiffImagePlugin

from lora_llava.data.images.headers import header_problem
from lora_llava.data.images.read import open_image
from lora_llava.data.record import ImageSource
from lora_llava.doctor.images import look_at_image
from lora_llava.errors import DataError
from tests.unit.data.test_grayscale import SCAN

PHOTOMETRIC, ORIENTATION = 262, 274
RED, BLUE = (200, 30, 10), (0, 0, 255)


def tiff(image: Image.Image | npt.NDArray[Any], tags: dict[int, int] | None = None, **options: Any) -> bytes:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in (tags or {}).items():
        directory[tag] = value
    buffer = io.BytesIO()
    picture.save(buffer, "TIFF", tiffinfo=directory, **options)
    return buffer.getvalue()


def stored(values: npt.NDArray[Any], *, endian: str = "<", tags: dict[int, int] | None = None) -> bytes:
    """Write gray values uncompressed, byte for byte, as scanners do."""
    body, bits = values.tobytes(), values.dtype.itemsize * 8
    entries = {256: values.shape[1], 257: values.shape[0], 258: bits, 259: 1, PHOTOMETRIC: 1, 273: 8, 277: 1}
    entries |= {278: values.shape[0], 279: len(body)} | (tags or {})
    start = (b"II" if endian == "<" else b"MM") + struct.pack(f"{endian}HI", 42, 8 + len(body))
    directory = b"".join(struct.pack(f"{endian}HHII", tag, 4, 1, entries[tag]) for tag in sorted(entries))
    return start + body + struct.pack(f"{endian}H", len(entries)) + directory + bytes(4)


def source(data: bytes, window: tuple[float, float] | None = None) -> ImageSource:
    return ImageSource("0123456789abcdef", None, data, "train.json, record 4", window=window)


def opened(data: bytes, window: tuple[float, float] | None = None) -> npt.NDArray[np.uint8]:
    return np.asarray(open_image(source(data, window)))


def refused(data: bytes) -> str:
    with pytest.raises(DataError) as caught:
        open_image(source(data))
    return str(caught.value)


def test_the_first_page_is_taken() -> None:
    pages = [Image.new("RGB", (4, 3), color) for color in (RED, BLUE)]
    data = tiff(pages[0], save_all=True, append_images=pages[1:])
    assert opened(data).tolist() == np.full((3, 4, 3), RED).tolist()


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "CMYK", "P"])
def test_8_bits_are_those_of_the_same_png(mode: str, compression: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)).convert(mode)
    assert (opened(tiff(noise, compression=compression)) == np.asarray(noise.convert("RGB"))).all()


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("window", [None, (0, 4095), (1000, 3000), (0, 65535)])
def test_16_bits_are_those_of_the_same_png(endian: str, window: tuple[float, float] | None) -> None:
    buffer = io.BytesIO()
    Image.fromarray(SCAN).save(buffer, "PNG")
    assert (
        opened(stored(SCAN.astype(f"{endian}u2"), endian=endian), window) == opened(buffer.getvalue(), window)
    ).all()


def test_12_bits_keep_200_levels_by_default_and_hardly_any_of_the_full_range() -> None:
    automatic, full = opened(stored(SCAN)), opened(stored(SCAN), (0.0, 65535.0))
    assert len(np.unique(automatic)) >= 200
    assert len(np.unique(full)) <= 17


@pytest.mark.parametrize("window", [None, (0, 4095)])
def test_white_stored_as_zero_is_white(window: tuple[float, float] | None) -> None:
    # Pillow inverts only 8 bits.
    inverted = opened(stored(SCAN, tags={PHOTOMETRIC: 0}), window)
    assert (inverted == 255 - opened(stored(SCAN), window)).all()
    small = (SCAN >> 4).astype(np.uint8)
    assert (opened(stored(small, tags={PHOTOMETRIC: 0})) == 255 - opened(stored(small))).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("bits", [8, 16])
def test_every_orientation_is_applied_once(orientation: int, bits: int) -> None:
    values = np.zeros((2, 4), dtype=np.uint8 if bits == 8 else np.uint16)
    values[0, 0] = 255
    upright = opened(tiff(values, {ORIENTATION: orientation}))
    corner = {1: (0, 0), 2: (0, 3), 3: (1, 3), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (3, 1), 8: (3, 0)}[orientation]
    assert upright.shape == ((4, 2, 3) if orientation > 4 else (2, 4, 3))
    assert np.argwhere(upright[..., 0] == 255).tolist() == [list(corner)]


def test_float_and_signed_values_use_their_range() -> None:
    floats = tiff(np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8))
    assert (opened(floats).min(), opened(floats).max()) == (0, 255)
    signed = stored(np.arange(-500, 524, dtype="<i2").reshape(32, 32), tags={339: 2})
    assert len(np.unique(opened(signed))) == 256


def test_what_is_not_read_is_named_with_what_to_do() -> None:
    several_bands = stored(np.zeros((4, 4), dtype="<u2"), tags={277: 4})
    assert "several bands of 16 bits; save it as 8-bit RGB or as 16-bit gray" in refused(several_bands)
    assert "a TIFF that is damaged" in refused(b"II*\0" + bytes(40))
    assert "truncated or damaged" in refused(stored(SCAN, tags={259: 5}))


def with_tiles(side: int) -> bytes:
    """Claim tiles of `side` pixels for an image of 8 x 8."""
    body = zlib.compress(bytes(64))
    entries = {256: 8, 257: 8, 258: 8, 259: 8, PHOTOMETRIC: 1, 277: 1, 322: side, 323: side, 324: 8, 325: len(body)}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, entries[tag]) for tag in sorted(entries))
    return b"II" + struct.pack("<HI", 42, 8 + len(body)) + body + struct.pack("<H", len(entries)) + directory + bytes(4)


@pytest.mark.fault("images: a decompression bomb")
def test_tiles_are_bounded_before_anything_is_decoded() -> None:
    assert "tiles of 32,768 x 32,768 pixels, at most 64,000,000" in refused(with_tiles(32768))
    assert header_problem(source(with_tiles(32768))) is not None
    assert "8,001 x 8,000 pixels, at most" in refused(stored(np.zeros((1, 1), np.uint8), tags={256: 8001, 257: 8000}))


def test_header_and_end_tell_complete_files_from_cut_ones() -> None:
    for data in (tiff(SCAN, compression="tiff_lzw"), stored(SCAN), tiff(Image.new("RGB", (90, 90), RED))):
        assert header_problem(source(data)) is None
    # Its directory comes before the pixels, and survives.
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    cut = tiff(noise, compression="packbits")
    assert header_problem(source(cut)) is None
    damaged = header_problem(source(cut[: len(cut) // 2]))
    assert damaged is not None
    assert "damaged" in str(damaged)


def test_lost_levels_of_16_bit_color_are_counted() -> None:
    facts = look_at_image(source(stored(SCAN)))
    assert (facts.error, facts.levels) == (None, 256)
    assert look_at_image(source(stored(SCAN), (0.0, 65535.0))).levels <= 17
