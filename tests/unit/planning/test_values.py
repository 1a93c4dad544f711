"""What the values of a table say about its columns."""

from __future__ import annotations

import pytest

from lora_llava.planning.proposal.values import columns_option

ROWS = [
    {"Patient": "P1", "Bild": "a.PNG", "Frage": "Ist das Herz groß?", "Antwort": "ja", "Nr": 1},
    {"Patient": "P2", "Bild": "b.dcm", "Frage": "Wo? ", "Antwort": "links", "Nr": 2},
    {"Patient": "P3", "Bild": None, "Frage": "Beschreibe das Bild.", "Antwort": "", "Nr": 3},
]


@pytest.mark.parametrize(
    ("names", "others", "option"),
    [
        (["Patient", "Bild", "Frage", "Antwort", "Nr"], ["Patient"], "image=Bild,question=Frage,answer=Antwort"),
        (["Bild", "Frage", "Antwort"], [], "image=Bild,question=Frage,answer=Antwort"),
        (["Patient", "Bild", "Frage", "Antwort"], [], "image=Bild,question=Frage,answer=COLUMN"),
        (["Bild", "Antwort"], [], "image=Bild,question=COLUMN,answer=COLUMN"),
        (["Frage", "Antwort"], [], "image=COLUMN,question=Frage,answer=Antwort"),
    ],
)
def test_images_and_questions_are_known_by_how_they_end(names: list[str], others: list[str], option: str) -> None:
    assert columns_option(ROWS, names, others) == f"--columns {option}"


def test_nothing_is_proposed_without_images_and_questions() -> None:
    assert columns_option(ROWS, ["Antwort", "Nr"], []) == ""
    assert columns_option([], ["Bild"], []) == ""


def test_names_are_quoted_for_a_shell_and_those_that_the_option_cannot_hold_are_left_out() -> None:
    rows = [{"the image": "a.png", "q,a": "What?", "x": "y"}]
    assert columns_option(rows, list(rows[0]), []) == "--columns 'image=the image,question=COLUMN,answer=COLUMN'"
