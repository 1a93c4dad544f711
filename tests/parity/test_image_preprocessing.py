"""Ours against LLaVA's `expand2square` and CLIP's image processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lora_llava.data.images import read as images
from lora_llava.data.images.read import preprocess

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SIZES = [(1, 1), (1, 9), (9, 1), (2, 3), (200, 41), (41, 200), (97, 101), (101, 97), (56, 56), (28, 28), (336, 335)]


def noise(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def clip(image: Image.Image, size: int) -> torch.Tensor:
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    values: torch.Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
    return values


def expand2square(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """The function of haotian-liu/LLaVA, `llava/mm_utils.py`, in its own words."""
    width, height = image.size
    if width == height:
        return image
    if width > height:
        result = Image.new(image.mode, (width, width), background)
        result.paste(image, (0, (width - height) // 2))
        return result
    result = Image.new(image.mode, (height, height), background)
    result.paste(image, ((height - width) // 2, 0))
    return result


@pytest.mark.parametrize("size", [28, 336])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_pad_equals_llava(width: int, height: int, size: int) -> None:
    image = noise(width, height)
    ours = preprocess(image, size=size, mean=MEAN, std=STD, aspect_ratio="pad")
    theirs = clip(expand2square(image, tuple(int(channel * 255) for channel in MEAN)), size)
    assert ours.shape == (3, size, size)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [28, 336])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_square_equals_clip(width: int, height: int, size: int) -> None:
    image = noise(width, height)
    ours = preprocess(image, size=size, mean=MEAN, std=STD, aspect_ratio="square")
    torch.testing.assert_close(ours, clip(image, size), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_square_of_a_long_image_resizes_only_what_it_keeps(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 0)
    image = noise(width, height)
    ours = preprocess(image, size=28, mean=MEAN, std=STD, aspect_ratio="square")
    # Where the box starts is rounded, so a value may fall on the other side of a half: one gray level of 255.
    difference = (ours - clip(image, 28)).abs()
    assert difference.max() < 1.01 / 255 / min(STD)
    assert (difference > 1e-6).float().mean() < 0.002
