"""Grey images of more than 8 bits: what becomes black and white, and that every reader does the same."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from lora_llava.artifact import Manifest
from lora_llava.data.images.grayscale import to_eight_bits
from lora_llava.data.images.read import open_image
from lora_llava.data.load import load_records
from lora_llava.data.record import ImageSource
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.stages import DataSettings

SCAN = np.linspace(0, 4095, 64 * 64).astype(np.uint16).reshape(64, 64)
"""12 bits in 16, every one of them used."""


def png(values: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def opened(values: npt.NDArray[Any], window: tuple[float, float] | None = None) -> npt.NDArray[np.uint8]:
    image = open_image(ImageSource("k", None, png(values), window=window))
    pixels = np.asarray(image)
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 0] == pixels[..., 2]).all()
    return pixels[..., 0]


@pytest.mark.fault("images: 1 x 1 pixel, extreme shapes, transparency, CMYK, 16 bits, animations, EXIF rotation")
@pytest.mark.parametrize("offset", [0, 1000, 32768, 61440])
def test_k14_a_scan_of_12_bits_keeps_its_grey_levels(offset: int) -> None:
    pixels = opened(SCAN + np.uint16(offset))
    assert len(np.unique(pixels)) == 256
    assert np.abs(pixels.astype(int) - SCAN * (255 / 4095)).max() <= 0.5


def test_k14_a_picture_of_the_whole_range_is_as_before() -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    assert opened(values).tolist() == [[0, 1, 1, 128, 255]]


@pytest.mark.parametrize("factor", [1, 256, 257])
def test_k14_an_8_bit_picture_in_16_bits_is_that_picture(factor: int) -> None:
    picture = np.random.default_rng(0).integers(3, 200, (20, 20), dtype=np.uint8)
    assert (opened(picture.astype(np.uint16) * np.uint16(factor)) == picture).all()


@pytest.mark.parametrize("stray", [0, 65535])
def test_k14_padding_and_markers_far_from_all_else_do_not_take_the_range(stray: int) -> None:
    values = SCAN + np.uint16(30_000)
    values[:4] = stray
    inside = opened(values)[4:]
    assert len(np.unique(inside)) > 200
    assert (opened(values)[:4] == (0 if stray == 0 else 255)).all()


def test_k14_two_and_three_values_stay_apart() -> None:
    assert np.unique(opened(np.array([[40_000, 40_001]], dtype=np.uint16))).tolist() == [0, 255]
    assert opened(np.array([[0, 1, 1000]], dtype=np.uint16)).tolist() == [[0, 0, 255]]


@pytest.mark.parametrize("levels", [8, 16])
@pytest.mark.parametrize("step", [1, 256, 257])
def test_k14_few_or_dark_values_in_steps_of_256_use_the_range(step: int, levels: int) -> None:
    values = (np.arange(levels) * step).astype(np.uint16)[None]
    assert opened(values).tolist() == [np.rint(np.arange(levels) * 255 / (levels - 1)).tolist()]
    dark = (np.arange(128) * step).astype(np.uint16)[None]
    assert opened(dark).max() == 255
    assert opened(dark + np.uint16(step)).tolist() == [list(range(1, 129))], "an 8-bit picture up to 128 stays"


@pytest.mark.parametrize("high", [1, 2, 200, 255, 256, 257, 4095, 4096, 32767, 32768, 51200, 65535])
def test_k14_a_mask_of_any_two_values_is_black_and_white(high: int) -> None:
    assert opened(np.array([[0, high]], dtype=np.uint16)).tolist() == [[0, 255]]
    assert to_eight_bits(np.array([[0, high]], dtype=np.float32)).tolist() == [[0, 255]]
    assert to_eight_bits(np.array([[0, high]], dtype=np.int32)).tolist() == [[0, 255]]


def test_k14_float_picture_from_0_to_1_uses_the_range() -> None:
    assert to_eight_bits(np.array([[0.0, 0.25, 1.0]], dtype=np.float32)).tolist() == [[0, 64, 255]]


@pytest.mark.parametrize("highest", [255, 256, 300])
def test_k14_no_jump_where_8_bits_end(highest: int) -> None:
    pixels = opened(np.arange(highest + 1, dtype=np.uint16)[None])
    assert np.abs(pixels - np.arange(highest + 1) * 255 / highest).max() <= 0.5


@pytest.mark.parametrize("markers", [(65535, 60000), (65535, 65534, 65533), (65535, 40000, 20000, 5000), (0, 65535)])
def test_k14_several_markers_do_not_take_the_range(markers: tuple[int, ...]) -> None:
    base = 30_000 if 0 in markers else 0
    values = np.array([[*(np.arange(1000) + base), *markers]], dtype=np.uint16)
    pixels = opened(values)[0]
    assert len(np.unique(pixels[:1000])) == 256
    assert pixels[1000:].tolist() == [0 if marker == 0 else 255 for marker in markers]


@pytest.mark.parametrize("step", [1, 256])
def test_k14_twenty_levels_and_a_marker_stay_apart(step: int) -> None:
    pixels = opened(np.array([[*(np.arange(20) * step), 65535]], dtype=np.uint16))[0]
    assert pixels[:20].tolist() == np.rint(np.arange(20) * 255 / 19).tolist()
    assert pixels[20] == 255


def test_k14_noise_of_a_picture_in_black_and_white_stays_noise() -> None:
    values = [0, 1, 2, 253, 254, 255]
    assert opened(np.array([values], dtype=np.uint16)).tolist() == [values]
    assert opened(np.array([[0, 1, 2, 65533, 65534, 65535]], dtype=np.uint16)).tolist() == [[0, 0, 0, 255, 255, 255]]


def test_k14_a_constant_picture_stays_constant() -> None:
    assert np.unique(opened(np.full((4, 4), 65535, np.uint16))).tolist() == [255]
    assert np.unique(opened(np.full((4, 4), 20_000, np.uint16))).tolist() == [78]
    assert np.unique(to_eight_bits(np.full((2, 2), -7.5))).tolist() == [128]


def test_k14_what_is_not_a_number_is_black_and_takes_no_range() -> None:
    values = np.array([[np.nan, np.inf, -np.inf, -0.5, 0.0, 0.5]], dtype=np.float32)
    assert to_eight_bits(values).tolist() == [[0, 0, 0, 0, 128, 255]]
    assert to_eight_bits(np.full((1, 2), np.nan)).tolist() == [[0, 0]]
    assert to_eight_bits(np.array([[-1000, 0, 3000]], dtype=np.int32)).tolist() == [[0, 64, 255]]
    assert to_eight_bits(SCAN.astype(">u2"), (0, 4095)).max() == 255


def test_k14_a_window_is_the_same_for_every_picture() -> None:
    values = np.array([[0, 1000, 2000, 3000, 65535]], dtype=np.uint16)
    assert opened(values, (1000, 3000)).tolist() == [[0, 0, 128, 255, 255]]
    assert opened(values[:, 1:3], (1000, 3000)).tolist() == [[0, 128]]


def test_k14_the_window_of_the_data_reaches_every_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(SCAN))
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]
    (tmp_path / "d.json").write_text(json.dumps([{"image": "a.png", "conversations": talk}]))
    (record,) = load_records(DataSettings.model_validate({"path": str(tmp_path / "d.json"), "window": [0, 100]}))
    assert record.image is not None
    assert (np.asarray(open_image(record.image)).min(axis=-1)[2:] == 255).all()


def test_k14_chat_and_eval_take_the_window_of_the_training() -> None:
    manifest: dict[str, Any] = {key: {} for key in Manifest.__slots__}
    facts = {"image_aspect_ratio": "pad", "window": [0, 4095]}
    assert Manifest(**manifest | {"images": facts}).usage.window == (0, 4095)
    assert Manifest(**manifest | {"images": {"image_aspect_ratio": "pad"}}).usage.window is None


def recipe(trained: Any, asked: Any, *, images: Any = "auto") -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "base": {"model_name_or_path": "x/y"},
            "images": {"window": images},
            "stages": {"instruct": {"data": {"path": "a.json", "window": trained}}},
            "evaluation": {"data": {"path": "b.json", "window": asked}},
        }
    )


def windows(settings: Recipe) -> list[tuple[float, float] | None]:
    assert settings.stages.instruct is not None
    assert settings.evaluation is not None
    return [settings.stages.instruct.data.gray_window, settings.evaluation.data.gray_window]


@pytest.mark.parametrize(
    ("images", "trained", "window"),
    [("auto", None, None), ("full", None, (0, 65535)), ([0, 4095], None, (0, 4095)), ([0, 4095], "auto", None),
     ([0, 4095], "full", (0, 65535)), ("auto", [1, 2], (1, 2)), ("full", [1, 2], (1, 2))],
)  # fmt: skip
def test_one_window_for_all_data_unless_they_set_their_own(
    images: Any, trained: Any, window: tuple[float, float] | None
) -> None:
    first = recipe(trained, trained, images=images)
    assert windows(first) == [window, window]
    # As a run writes it, and reads it again.
    assert windows(Recipe.model_validate(first.plain() | {"output_dir": None})) == [window, window]


@pytest.mark.parametrize("images", ["automatic", [4095, 0], [0], None, 12])
def test_a_window_that_is_none_is_refused(images: Any) -> None:
    with pytest.raises(ValueError, match="window"):
        recipe(None, None, images=images)


def test_k14_a_window_is_low_and_high_and_one_for_training_and_evaluation() -> None:
    assert recipe([0, 4095], [0, 4095]).stages.instruct is not None
    with pytest.raises(ValueError, match=r"window .*: the first value, shown as black, must be the lower one"):
        recipe([4095, 0], [4095, 0])
    with pytest.raises(ValueError, match=r"evaluation\.data\.window None differs from the last stage.s \[0"):
        recipe([0, 4095], None)
