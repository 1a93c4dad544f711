"""The parts of the comparison that need no model."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from lora_llava.conversation import Turn
from lora_llava.data.records import ImageSource, Record
from lora_llava.evaluation.compare import blind_subset, shown_progress, summarize, varied_samples
from lora_llava.evaluation.metrics import accuracy_by_type


def record(image: str | None, answer: str = "yes") -> Record:
    source = None if image is None else ImageSource(image, Path(image), None)
    return Record("id", source, (Turn("user", "<image>\n?"), Turn("assistant", answer)), "here")


def test_the_blind_subset_is_of_whole_images() -> None:
    records = [record("a"), record("b"), record(None), record("a"), record("c"), record("b")]
    assert blind_subset(records, 1) == [0, 3]
    assert blind_subset(records, 2) == [0, 3]
    assert blind_subset(records, 3) == [0, 1, 3, 5]
    assert blind_subset(records, 100) == [0, 1, 3, 4, 5]


def test_samples_are_of_different_images_and_answers() -> None:
    records = [record(str(number // 4), ("yes", "no", "red", "2")[number % 4]) for number in range(80)]
    chosen = varied_samples(records, 12)
    assert len({records[place].image for place in chosen}) == 12
    assert {records[place].turns[-1].text for place in chosen} == {"yes", "no", "red", "2"}
    assert chosen[-1] >= 72, "spread over the whole set"
    assert len(varied_samples(records[:6], 12)) == 2
    assert varied_samples([record(None)], 12) == []


def test_the_summary_counts_points() -> None:
    truth = ["yes", "no", "red", "2"]
    tuned, base = accuracy_by_type([1, 1, 1, 0], truth), accuracy_by_type([1, 0, 0, 0], truth)
    blind = accuracy_by_type([1, 0], ["yes", "no"])
    seen = accuracy_by_type([1, 1], ["yes", "no"])
    result = summarize({"base": base, "tuned": tuned}, {"tuned": seen, "blind": blind}, images=2)
    assert (result["tuned"]["accuracy"], result["base"]["accuracy"]) == (0.75, 0.25)
    assert result["points_gained"] == 50.0
    assert result["blind"]["accuracy"] == 0.5
    assert result["tuned_on_blind_questions"]["accuracy"] == 1.0
    assert result["points_gained_over_blind"] == 50.0
    assert result["tuned"]["by_type"]["closed"]["correct"] == 2
    assert "points_gained" not in summarize({"tuned": tuned}, {}, images=2)


def test_progress_is_plain_lines_off_a_terminal() -> None:
    text = io.StringIO()
    with shown_progress("answers", 100, Console(file=text)) as progress:
        for done in range(0, 101, 4):
            progress(done, 100)
    lines = text.getvalue().splitlines()
    assert lines[-1] == "answers: 100/100"
    assert len(lines) == 10
    assert "\x1b" not in text.getvalue()
