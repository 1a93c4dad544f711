"""Questions without references: the readers of training data, and one question about a folder of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from lora_llava.data.images.directory import list_images
from lora_llava.data.questions import QuestionSet, load_image_questions, load_open_questions, load_questions
from lora_llava.errors import DataError
from lora_llava.recipe.columns import ColumnSettings
from lora_llava.recipe.stages import DataSettings, QuestionSettings

COLUMNS = {"image": "image", "question": "question"}


def human(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def asked(questions: QuestionSet) -> list[tuple[str, tuple[str, ...], int]]:
    return [(question.record.question, question.references, question.number) for question in questions.questions]


def load(tmp_path: Path, records: Any, **settings: Any) -> QuestionSet:
    path = tmp_path / "ask.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return load_open_questions(QuestionSettings.model_validate({"path": str(path), **settings}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "scans" / "b").mkdir(parents=True)
    for name in ("b/2.PNG", "10.png", "a:1.png"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / "scans" / name)
    Image.new("RGB", (4, 4), "red").save(tmp_path / "scans" / "unnamed", format="PNG")
    (tmp_path / "scans" / "notes.txt").write_text("no image")
    (tmp_path / "scans" / ".hidden.png").write_bytes(b"")
    (tmp_path / "scans" / "again").symlink_to(tmp_path / "scans")
    return tmp_path / "scans"


def test_the_last_question_without_an_answer_is_asked_alone(tmp_path: Path) -> None:
    open_, blank, later = human("a?"), human("b?", " "), human("c?", "1", "d?")
    questions = load(tmp_path, [{"conversations": turns} for turns in (open_, blank, later)])
    assert asked(questions) == [("a?", (), 1), ("b?", (), 1), ("d?", (), 1)]
    assert [turn.text for turn in questions.questions[2].record.turns] == ["c?", "1", "d?"]


def test_answered_records_are_asked_what_an_evaluation_asks(tmp_path: Path) -> None:
    records = [{"conversations": human("a?", "1", "b?", "2"), "patient": 7}]
    questions = load(tmp_path, records).questions
    assert questions == load_questions(DataSettings(path=str(tmp_path / "ask.json"))).questions
    assert [question.own for question in questions] == [{"patient": 7}] * 2


@pytest.mark.parametrize(("row", "references"), [("", ()), (" ", ()), ("no", ("no",))])
def test_a_table_needs_no_answers(tmp_path: Path, row: str, references: tuple[str, ...]) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    path = tmp_path / "ask.csv"
    path.write_text(f"image,question,answer,patient\nx.png,a?,{row},p1\n", encoding="utf-8")
    for columns in (COLUMNS, {**COLUMNS, "answer": "answer"}):
        [question] = load_open_questions(
            QuestionSettings.model_validate({"path": str(path), "columns": columns})
        ).questions
        assert question.record.question == "a?"
        assert question.references == (references if "answer" in columns else ())
        assert question.own["patient"] == "p1"


def test_training_still_needs_answers() -> None:
    with pytest.raises(ValidationError, match="give question and answer, or messages, or question, chosen"):
        ColumnSettings.model_validate(COLUMNS)
    with pytest.raises(ValidationError, match="give question, or messages"):
        QuestionSettings.model_validate({"path": "a.csv", "columns": {"image": "image"}})


def test_turns_out_of_order_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="turn 2: role is 'user'"):
        load(tmp_path, [{"conversations": [*human("a?"), *human("b?")]}])


def test_bad_records_are_collected_if_asked(tmp_path: Path) -> None:
    records = [
        {"conversations": 1},
        {"conversations": human("a?")},
        {"id": "z", "conversations": human("a?", "b", "c?")[::2]},
    ]
    questions = load(tmp_path, records, on_bad_record="skip")
    assert asked(questions) == [("a?", (), 1)]
    assert [(bad.record, bad.id) for bad in questions.skipped] == [(1, None), (3, "z")]
    with pytest.raises(DataError, match="record 1: conversations"):
        load(tmp_path, records)


def test_a_missing_image_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 1 image is missing.*gone.png"):
        load(tmp_path, [{"image": "gone.png", "conversations": human("<image>\na?")}])


def folder_settings(folder: Path, **settings: Any) -> QuestionSettings:
    return QuestionSettings.model_validate({"path": str(folder), "columns": COLUMNS, **settings})


def test_a_question_that_is_no_unicode_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="question: character 3 is half of a surrogate pair; write the text again"):
        load_image_questions(folder, "Pr\udcfcfen?", folder_settings(folder))


def test_every_image_of_a_folder_is_asked_in_order(folder: Path) -> None:
    questions = load_image_questions(folder, "what is it?", folder_settings(folder, answer_prompt="One word."))
    names = ["10.png", "a:1.png", "b/2.PNG", "unnamed"]
    assert [question.record.id for question in questions.questions] == names
    assert [question.record.image and question.record.image.label for question in questions.questions] == names
    assert {turn.text for question in questions.questions for turn in question.record.turns} == {
        "<image>\nwhat is it?\nOne word."
    }
    assert list_images(folder).others == ["notes.txt"]
    first = load_image_questions(folder, "what?", folder_settings(folder, max_records=1))
    assert [question.record.id for question in first.questions] == names[:1]


def test_a_damaged_image_of_a_folder_is_skipped_if_asked(folder: Path) -> None:
    (folder / "0.png").write_bytes(b"torn")
    (folder / "out.png").symlink_to("/etc/hostname")
    questions = load_image_questions(folder, "what?", folder_settings(folder, on_bad_record="skip"))
    assert len(questions.questions) == 4
    assert [(bad.record, bad.id) for bad in questions.skipped] == [(1, "0.png"), (5, "out.png")]
    with pytest.raises(DataError, match=r"out.png' is a link out of image_root"):
        load_image_questions(folder, "what?", folder_settings(folder))


@pytest.mark.parametrize("question", ["", " \n", "<image>\nwhat?"])
def test_a_question_about_a_folder_is_text(folder: Path, question: str) -> None:
    with pytest.raises(DataError, match="write a text without <image>"):
        load_image_questions(folder, question, folder_settings(folder))


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images"):
        list_images(tmp_path)
    with pytest.raises(DataError, match="gone: does not exist"):
        list_images(tmp_path / "gone")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="file: is not a directory"):
        list_images(tmp_path / "file")
