"""Boxes at the border of an image."""

from __future__ import annotations

import pytest

from lora_llava.data.convert.boxes import Box, clipped, llava_box
from lora_llava.errors import DataError


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((-0.5, 0, 5, 10.5), (0, 0, 5, 10)),
        ((5, -1, 11, 3), (5, 0, 10, 3)),
        ((9.5, 0, 11, 10), (9.5, 0, 10, 10)),
    ],
)
def test_a_box_is_clipped_by_at_most_a_pixel(box: Box, expected: Box) -> None:
    assert clipped(box, (10, 10), "a.json") == expected


@pytest.mark.parametrize("box", [(-1, 2, -0.5, 8), (10.2, 2, 10.8, 8), (2, -1, 8, 0), (2, 10, 8, 11), (-2, 0, 5, 5)])
def test_a_box_of_which_nothing_is_on_the_image_is_refused(box: Box) -> None:
    for read in (clipped, llava_box):
        with pytest.raises(DataError, match=r"a.json: is \(.*, outside of the image of 10 x 10 pixels"):
            read(box, (10, 10), "a.json")
