"""The preflight says which images were found with another extension."""

from __future__ import annotations

from pathlib import Path

from lora_llava.data.record import ImageSource
from lora_llava.planning.preflight.images import Images, images_have_their_names


def test_images_with_another_extension_are_counted_with_an_example() -> None:
    sources = [ImageSource(f"x/{n}.jpg", Path(f"/d/x/{n}.jpg"), None, asked=f"{n}.JPG" if n else "") for n in range(3)]
    (notice,) = images_have_their_names(Images({"stages.align.data": {source.identity: source for source in sources}}))
    assert str(notice) == (
        "stages.align.data: 2 images found with another extension than in the data, such as: 1.JPG is 1.jpg"
    )
    assert list(images_have_their_names(Images({"evaluation.data": {"0": sources[0]}}))) == []
