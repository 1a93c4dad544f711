"""What strangers' data may hold: it is refused by name, or read as what it is, and nothing is run or hung."""

from __future__ import annotations

import json
import os
import resource
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_llava.data.images.read import MAX_BYTES, open_image, preprocess
from lora_llava.data.load import load_records
from lora_llava.data.record import MAX_CHARACTERS, ImageSource
from lora_llava.errors import DataError
from lora_llava.recipe.stages import DataSettings
from lora_llava.system.processes import in_processes
from tests.helpers.faulty import encoded, entry, scene


def embedded(data: bytes) -> ImageSource:
    return ImageSource("0123456789abcdef", None, data)


def refused(folder: Path, content: bytes, name: str = "train.json") -> str:
    (folder / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_records(DataSettings(path=str(folder / name)))
    return str(caught.value)


@pytest.mark.fault("records: broken JSON and JSON Lines, huge numbers, lone surrogates, NaN, duplicate keys")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"id": NaN}]', "NaN is not a number of JSON"),
        (b'[{"id": -Infinity}]', "-Infinity is not a number of JSON"),
        (b'[{"id": "a", "id": "b"}]', "key 'id' occurs twice in one object"),
        (b'[{"x": {"y": 1, "y": 1}}]', "key 'y' occurs twice in one object"),
        (b'[{"id": 1e999}]', "id: is a number, must be text or an integer"),
        (b'[{"id": "x"},]', "not valid JSON"),
        (b"[" + b'{"a":' * 50_000, "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b"[\xff]", "not UTF-8"),
        (b"\xff\xfe[\x00]", "not utf-16"),
        (b"\xff\xfe[\x00]\x00", "holds no records"),
        (b"", "not valid JSON"),
    ],
)
def test_json_that_is_none_is_refused_with_its_place(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in refused(tmp_path, content)
    assert "train.jsonl" in refused(tmp_path, content or b"{", "train.jsonl")


def test_a_byte_order_mark_in_json_is_passed_over(tmp_path: Path) -> None:
    made = [{"conversations": entry("x", "", "q", "a")["conversations"]}]
    made[0]["conversations"][0]["value"] = "q"
    (tmp_path / "train.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(made).encode())
    assert len(load_records(DataSettings(path=str(tmp_path / "train.json")))) == 1


def test_a_text_without_end_is_refused_before_it_is_tokenised(tmp_path: Path) -> None:
    made = entry("x", "a.png", "a" * MAX_CHARACTERS, "b")
    (tmp_path / "a.png").write_bytes(encoded(scene(0)))
    assert f"at most {MAX_CHARACTERS:,} are read" in refused(tmp_path, json.dumps([made]).encode())


def test_no_escape_sequence_of_the_data_reaches_the_terminal(tmp_path: Path) -> None:
    made = [entry("\x1b[2J\nx", "\x1b]0;y\x07.png", "q", "a"), entry("a", "a.png", "q", "a")]
    for content in (made, [made[0] | {"conversations": [{"from": "\x1b[31m", "value": "x"}]}]):
        assert refused(tmp_path, json.dumps(content).encode()).isprintable()


def test_a_pipe_or_a_directory_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "folder.png"):
        assert f"'{name}' is not a file" in refused(tmp_path, json.dumps([entry("x", name, "q", "a")]).encode())


@pytest.mark.fault("images: file names with NUL bytes, of any length, or in another Unicode normal form")
def test_a_name_in_another_unicode_form_is_that_of_the_file(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "\u00e9.png") for form in ("NFC", "NFD"))
    (tmp_path / composed).write_bytes(encoded(scene(0)))
    for name in (composed, apart):
        (tmp_path / "train.json").write_text(json.dumps([entry("x", name, "q", "a")]), encoding="utf-8")
        [record] = load_records(DataSettings(path=str(tmp_path / "train.json")))
        assert record.image is not None
        assert record.image.path == tmp_path / composed


@pytest.mark.fault("images: PSD, FITS, EPS, SVG and other formats")
@pytest.mark.parametrize(
    "head",
    [b"8BPS\0\1" + bytes(20), b"%!PS-Adobe-3.0 EPSF-3.0\n", b"SIMPLE  =                    T", b"<svg xmlns=''/>",
     b"MZ", b"PK\3\4", b"%PDF-1.4", b"P6 2 2 255\n" + bytes(12)],
)  # fmt: skip
def test_formats_that_are_not_allowed_are_refused_by_their_content(head: bytes) -> None:
    with pytest.raises(DataError, match="not an image of a known format"):
        open_image(embedded(head + bytes(200)))


def test_a_file_that_is_no_image_by_its_size_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.png").open("wb") as handle:
        handle.truncate(MAX_BYTES + 1)
    with pytest.raises(DataError, match=f"huge.png: {MAX_BYTES + 1:,} bytes, at most"):
        open_image(ImageSource("huge.png", tmp_path / "huge.png", None))


@pytest.mark.fault("images: 1 x 1 pixel, extreme shapes, transparency, CMYK, 16 bits, animations, EXIF rotation")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(orientation: int) -> None:
    pixels = np.zeros((16, 24, 3), dtype=np.uint8)
    pixels[:8, :8] = 255
    upright = Image.fromarray(pixels)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = stored.getexif()
    exif[0x0112] = orientation
    opened = open_image(embedded(encoded(stored, "PNG", exif=exif)))
    assert np.array_equal(np.asarray(opened), pixels)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(40), b"Exif\0\0no header of a TIFF"])
def test_metadata_that_are_garbage_do_not_matter(form: str, exif: bytes) -> None:
    data = encoded(scene(3), form, exif=exif)
    assert open_image(embedded(data)).size == (32, 32)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_an_image_is_upright_also_if_its_other_metadata_cannot_be_written(form: str) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "x"
    # The text under the tag of a width, which is a number.
    raw = exif.tobytes().replace(b"\x01\x0f", b"\x01\x00", 1)
    assert open_image(embedded(encoded(scene(3).resize((40, 30)), form, exif=raw))).size == (30, 40)


@pytest.mark.fault("images: 1 x 1 pixel, extreme shapes, transparency, CMYK, 16 bits, animations, EXIF rotation")
@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (2, 3)])
@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
def test_images_of_a_pixel_or_a_line_become_a_square(size: tuple[int, int], aspect_ratio: str) -> None:
    image = open_image(embedded(encoded(Image.new("RGB", size, (9, 200, 9)))))
    pixels = preprocess(image, size=28, mean=(0.5,) * 3, std=(0.25,) * 3, aspect_ratio=aspect_ratio)
    assert pixels.shape == (3, 28, 28)
    assert bool(pixels.isfinite().all())


@pytest.mark.fault("images: 1 x 1 pixel, extreme shapes, transparency, CMYK, 16 bits, animations, EXIF rotation")
@pytest.mark.parametrize("form", ["WEBP", "PNG", "GIF"])
def test_of_an_animation_the_first_frame_is_taken(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0))]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    red, green, blue = open_image(embedded(data)).getpixel((4, 4))  # type: ignore[misc]
    assert (red > 200, green < 50, blue < 50) == (True, True, True)


@pytest.mark.fault("images: a photo of 20 megapixels, which is fine")
def test_a_large_photo_is_read_in_bounded_memory() -> None:
    data = encoded(Image.new("RGB", (5200, 4000), (10, 90, 30)), "JPEG")

    def growth(source: ImageSource) -> Any:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        size = open_image(source).size
        return size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    [(size, kibibytes)] = in_processes(growth, [embedded(data)], on_crash=lambda _: ((0, 0), 0), workers=1)
    assert size == (5200, 4000)
    assert kibibytes < 300 * 1024
