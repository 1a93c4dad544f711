"""What a run prints of its sample answers."""

from __future__ import annotations

import pytest

from lora_llava.training.log import sample_line, without_shared_line


def samples(*questions: str) -> list[dict[str, str]]:
    return [{"question": question, "answer": "a", "prediction": "b"} for question in questions]


def test_a_line_that_all_questions_share_is_left_out() -> None:
    given = samples("Which?\nA. x\nB. y\nAnswer with a letter.", "How?\nAnswer with a letter.")
    shown = without_shared_line(given)
    assert [sample["question"] for sample in shown] == ["Which?\nA. x\nB. y", "How?"]
    assert sample_line(shown[1]).plain == "  How? -> b (true: a)"
    assert given[1]["question"] == "How?\nAnswer with a letter."


@pytest.mark.parametrize(
    "questions",
    [(), ("How?\nAnswer with a letter.",), ("How?\nShort.", "How?\nLong."), ("How?", "How?"), ("\nA", "b\nA")],
)
def test_other_lines_stay(questions: tuple[str, ...]) -> None:
    assert without_shared_line(samples(*questions)) == samples(*questions)
