"""Cached image features: what is trained with them is what is trained with pixels."""

from __future__ import annotations

import errno
import os
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import lora_llava.training.feature_cache as feature_cache
from lora_llava.data.record import ImageSource, Record
from lora_llava.data.rows import ImageTransform, PackedRows
from lora_llava.errors import TrainingError
from lora_llava.modeling.base import drop_unused_layers
from lora_llava.modeling.packed import llava_in, packed_loss
from lora_llava.modeling.structure import VISION_TOWER
from lora_llava.training.feature_cache import use_features
from tests.helpers.tiny import IMAGE_MEAN, IMAGE_SIZE, IMAGE_STD
from tests.parity.test_packed import branches, build_model, error, gradients

TRANSFORM = ImageTransform(IMAGE_SIZE, IMAGE_MEAN, IMAGE_STD, "pad")


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    """Two questions about one image, one about another, one without."""
    made = []
    for number, name in enumerate(("a", "a", "b", None)):
        if name:
            Image.new("RGB", (30, 20), (90 * (name == "a"), 30, 200)).save(tmp_path / f"{name}.png")
        image = None if name is None else ImageSource(f"{name}.png", tmp_path / f"{name}.png", None)
        made.append(Record(str(number), image, (), f"record {number}"))
    return made


def model() -> Any:
    made = build_model()
    drop_unused_layers(made.get_base_model())
    return made


def passes(model: Any) -> list[int]:
    """The images that pass through the real tower, call by call."""
    counts: list[int] = []
    tower = llava_in(model).get_submodule(VISION_TOWER)
    tower.register_forward_hook(lambda *inputs: counts.append(len(inputs[1][0]) if inputs[1] else 0))
    return counts


def row(records: list[Record], read_image: Any) -> Any:
    encoded = [*branches(2), *branches(1)]
    return PackedRows([((0, 1), (2,))], records, encoded, read_image)[0]


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_loss_and_gradients_are_those_of_pixels(records: list[Record], tmp_path: Path, where: str) -> None:
    plain, cached = model(), model()
    theirs = packed_loss(plain, row(records, TRANSFORM), 7)
    features = use_features(cached, records, TRANSFORM, tmp_path / "features" if where == "disk" else None)
    ours = packed_loss(cached, row(records, features), 7)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert error(gradients(cached, ours), gradients(plain, theirs)) < 1e-5


def test_every_image_is_computed_once_and_pixels_still_work(records: list[Record]) -> None:
    cached = model()
    counts = passes(cached)
    features = use_features(cached, records, TRANSFORM, None)
    # One image to learn the shape, then both.
    assert counts == [1, 2]
    packed_loss(cached, row(records, features), 7)
    assert counts == [1, 2]
    packed_loss(cached, row(records, TRANSFORM), 7)
    assert counts == [1, 2, 2]


def test_what_lies_on_disk_is_found_by_the_next_run(records: list[Record], tmp_path: Path) -> None:
    first = use_features(model(), records, TRANSFORM, tmp_path / "features")
    again = model()
    counts = passes(again)
    second = use_features(again, records, TRANSFORM, tmp_path / "features")
    assert counts == [1]
    assert torch.equal(first.values, second.values)
    assert [path.suffix for path in (tmp_path / "features").iterdir()] == [".features"]


def test_another_tower_image_or_form_has_features_of_its_own(records: list[Record], tmp_path: Path) -> None:
    directory = tmp_path / "features"
    use_features(model(), records, TRANSFORM, directory)
    other = model()
    with torch.no_grad():
        next(llava_in(other).get_submodule(VISION_TOWER).parameters()).add_(1.0)
    use_features(other, records, TRANSFORM, directory)
    use_features(model(), records, ImageTransform(IMAGE_SIZE, IMAGE_MEAN, IMAGE_STD, "square"), directory)
    Image.new("RGB", (30, 20), (1, 2, 3)).save(tmp_path / "a.png")
    use_features(model(), records, TRANSFORM, directory)
    assert len(list(directory.iterdir())) == 4


def test_k33_a_tower_of_another_config_has_features_of_its_own(records: list[Record], tmp_path: Path) -> None:
    first = use_features(model(), records, TRANSFORM, tmp_path / "features")
    other = model()
    tower = llava_in(other).get_submodule(VISION_TOWER)
    tower.config.layer_norm_eps = 0.5
    for module in tower.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 0.5
    second = use_features(other, records, TRANSFORM, tmp_path / "features")
    assert not torch.equal(first.values, second.values)
    assert len(list((tmp_path / "features").iterdir())) == 2


def test_without_room_nothing_is_left_behind(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: usage(100, 90, 10))
    with pytest.raises(TrainingError, match=r"the features of 2 images take .* set cache_image_features: off"):
        use_features(model(), records, TRANSFORM, tmp_path / "features")
    monkeypatch.setattr(feature_cache, "free_memory_bytes", lambda _: 10)
    with pytest.raises(TrainingError, match="cache_image_features: disk or off"):
        use_features(model(), records, TRANSFORM, None)
    monkeypatch.undo()

    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_cache, "_features", feature_cache._features)
    monkeypatch.setattr(feature_cache, "_open", full)
    with pytest.raises(TrainingError, match="No space left on device"):
        use_features(model(), records, TRANSFORM, tmp_path / "features")
    assert list((tmp_path / "features").iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    {
        "zeroed by a power cut": lambda data: bytes(len(data)),
        "cut off": lambda data: data[:-40],
        "empty": lambda data: data[:0],
        "one bit": lambda data: bytes([data[0] ^ 1]) + data[1:],
        "without a checksum": lambda data: data[:-32],
        "longer": lambda data: data + b"x",
    }.values(),
)
def test_k65_damaged_features_are_computed_again(records: list[Record], tmp_path: Path, damage: Any) -> None:
    # A copy: the values are those of the file, which is overwritten.
    first = use_features(model(), records, TRANSFORM, tmp_path / "cache").values.clone()
    [path] = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    made = model()
    counts = passes(made)
    again = use_features(made, records, TRANSFORM, tmp_path / "cache")
    assert sum(counts) >= 2
    assert torch.equal(again.values, first)
    assert path.read_bytes() == whole


def test_k65_a_full_disk_is_an_error_and_not_a_signal(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TrainingError, match=r"could not be written to .*No space left on device; make room"):
        use_features(model(), records, TRANSFORM, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
