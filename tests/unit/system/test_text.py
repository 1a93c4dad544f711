"""Counts and text as a user reads them."""

from __future__ import annotations

import pytest

from lora_llava.system.text import counted, listed, printable


@pytest.mark.parametrize(
    ("number", "noun", "plural", "text"),
    [
        (0, "image", None, "0 images"),
        (1, "image", None, "1 image"),
        (2000, "image", None, "2,000 images"),
        (1.0, "epoch", None, "1 epoch"),
        (0.5, "epoch", None, "0.5 epochs"),
        (1, "entry", "entries", "1 entry"),
        (3, "entry", "entries", "3 entries"),
    ],
)
def test_counts_have_the_right_plural(number: float, noun: str, plural: str | None, text: str) -> None:
    assert counted(number, noun, plural) == text


def test_control_characters_are_shown_not_obeyed() -> None:
    hostile = "a\x1b[31mred\x07\r\n\x9b2J\u202eback\u2028\ud800"
    assert printable(hostile) == "a\\e[31mred\\x07\\r\\n\\x9b2J\\u202eback\\u2028\\ud800"


def test_ordinary_text_stays() -> None:
    text = "naïve café, 東京, नमस्ते\u200d, 👩\u200d🔬 100 %"
    assert printable(text) == text


def test_long_lists_end_in_a_count() -> None:
    assert listed([str(n) for n in range(3)]) == "0, 1, 2"
    assert listed([str(n) for n in range(11)], most=2) == "0, 1 and 9 more"
