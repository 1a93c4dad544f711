"""Records as questions, and what is passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_llava.data.questions import QuestionSet, load_questions
from lora_llava.errors import DataError
from lora_llava.recipe.stages import DataSettings


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def load(
    tmp_path: Path, conversations: list[list[dict[str, str]]], by: tuple[str, ...] = (), **own: Any
) -> QuestionSet:
    records = [{"id": f"r{number}", "conversations": one, **own} for number, one in enumerate(conversations)]
    path = tmp_path / "test.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return load_questions(DataSettings(path=str(path)), by)


def test_k13_every_answered_turn_is_a_question(tmp_path: Path) -> None:
    made = load(tmp_path, [turns("a?", "1", "b?", "2", "c?", "3")])
    assert [(one.record.question, one.answer, one.number, one.of) for one in made.questions] == [
        ("a?", "1", 1, 3),
        ("b?", "2", 2, 3),
        ("c?", "3", 3, 3),
    ]
    assert [turn.text for turn in made.questions[1].record.turns] == ["a?", "1", "b?", "2"], "earlier ones as trained"
    assert made.questions[1].record.where.endswith("question 2")
    assert made.passed_over() == []


def test_k13_what_is_not_asked_is_counted_by_cause(tmp_path: Path) -> None:
    answered, open_, blank = turns("a?", "1"), turns("a?"), turns("a?", "  ")
    made = load(tmp_path, [answered, open_, answered, open_, answered, blank])
    assert len(made.questions) == 3
    assert made.passed_over() == ["3 of 6 records have no answer: not asked"]
    made = load(tmp_path, [turns("a?", "1", "b?"), turns("a?", "1", "b?", "2", "c?", "")])
    assert [one.answer for one in made.questions] == ["1", "1", "2"]
    assert made.passed_over()[0].startswith("2 records of 2 with a last question without an answer")
    assert load(tmp_path, [answered, open_]).passed_over() == ["1 of 2 records has no answer: not asked"]


def test_k13_nothing_to_ask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the 2 records of .*test.json has an answer"):
        load(tmp_path, [turns("a?"), turns("b?")])


def test_turns_out_of_order_are_refused_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="turn 2"):
        load(tmp_path, [turns("a?", "", "b?", "2")])
    with pytest.raises(DataError, match="turn 1"):
        load(tmp_path, [[{"from": "gpt", "value": " "}]])


def test_k38_by_names_a_key_of_the_data(tmp_path: Path) -> None:
    made = load(tmp_path, [turns("a?", "1")], by=("patient",), patient=7, modality="CT", ok=True)
    [one] = made.questions
    assert [one.value(key) for key in ("patient", "modality", "ok", "nothing")] == ["7", "CT", "true", "(none)"]
    with pytest.raises(DataError, match=r"key or column 'patiet'; they have .*\. Did you mean patient\?"):
        load(tmp_path, [turns("a?", "1")], by=("patiet",), patient=7)
    with pytest.raises(DataError, match="they have no other keys"):
        load(tmp_path, [turns("a?", "1")], by=("patient",))


def test_of_several_answers_the_reference_is_the_one_trained_on(tmp_path: Path) -> None:
    asked, answered = turns("Is it?", "")
    [question] = load(tmp_path, [[asked, answered | {"value": ["no", "yes", "yes"]}]]).questions
    assert question.references == ("no", "yes", "yes")
    assert question.answer == question.record.turns[-1].text == "yes"
    assert question.described("reference", (), ())["reference"] == "yes"


def test_answers_of_an_earlier_turn_are_no_references_of_the_last(tmp_path: Path) -> None:
    first, several = turns("Is it?", "")
    messages = [first, several | {"value": ["no", "yes"]}, {"role": "user", "content": "Why?"}]
    messages.append({"role": "assistant", "content": [{"type": "text", "text": "because"}]})
    assert [one.references for one in load(tmp_path, [messages]).questions][-1] == ("because",)
