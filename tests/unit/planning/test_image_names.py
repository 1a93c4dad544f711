"""The preflight says which images were found with another extension, and which files of folders are left out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from lora_llava.data.record import ImageSource
from lora_llava.planning.preflight import data
from lora_llava.planning.preflight.images import Images, images_have_their_names
from lora_llava.planning.preflight.setup import Setup
from lora_llava.recipe.stages import DataSettings


def test_images_with_another_extension_are_counted_with_an_example() -> None:
    sources = [ImageSource(f"x/{n}.jpg", Path(f"/d/x/{n}.jpg"), None, asked=f"{n}.JPG" if n else "") for n in range(3)]
    (notice,) = images_have_their_names(Images({"stages.align.data": {source.identity: source for source in sources}}))
    assert str(notice) == (
        "stages.align.data: 2 images found with another extension than in the data, such as: 1.JPG is 1.jpg"
    )
    assert list(images_have_their_names(Images({"evaluation.data": {"0": sources[0]}}))) == []


@pytest.mark.fault("images: photos in HEIC in a folder of a class")
def test_files_of_class_folders_that_are_not_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = DataSettings(path=str(tmp_path))
    monkeypatch.setattr(data, "sources", lambda _: [("stages.instruct.data", source)])
    setup = cast("Setup", SimpleNamespace(recipe=None))
    for name in ("good/1.png", "bad/2.JPG", "bad/3.jfif", "bad/metadata.csv", "bad/.hidden", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(data.folders_hold_images(setup)) == []
    for name in ("good/4.heic", "bad/5.mpo"):
        (tmp_path / name).touch()
    (notice,) = data.folders_hold_images(setup)
    assert str(notice) == (
        "stages.instruct.data.path: 2 files left out, not named like an image: bad/5.mpo, good/4.heic. "
        "Photos in HEIC: save them as JPEG"
    )
