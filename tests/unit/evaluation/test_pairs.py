"""Preference pairs: which answers are rejected, and what becomes of the other questions."""

from __future__ import annotations

import pytest

from lora_llava.conversation.encode import Turn
from lora_llava.data.questions import Question
from lora_llava.data.record import Record
from lora_llava.evaluation.pairs import Pair, Sample, is_wrong, pair_record, pair_up
from lora_llava.recipe.choices import Metric


def question(*references: str, number: int = 1) -> Question:
    turns = (Turn("user", "what?"), Turn("assistant", references[0]))
    return Question(Record(str(number), None, turns, "a record", number), references)


def whole(*texts: str) -> list[Sample]:
    return [Sample(text, is_cut=False) for text in texts]


def kinds(pairs: list[Pair]) -> list[tuple[str, str, int]]:
    return [(pair.kind, pair.rejected, pair.times) for pair in pairs]


def test_the_most_frequent_wrong_answer_is_rejected() -> None:
    asked = question("red")
    samples = whole("blue", "Red.", "green", "Green", "a red")
    made = pair_up([asked], [samples], {}, "exact_match")
    assert kinds(list(made.pairs)) == [("sampled", "green", 2)]
    made = pair_up([asked], [samples], {}, "exact_match", per_question=3)
    assert kinds(list(made.pairs)) == [("sampled", "green", 2), ("sampled", "blue", 1)]
    assert (made.num_questions, made.all_right, made.unusable) == (1, 0, 0)


def test_every_pair_of_a_question_has_its_own_id() -> None:
    samples = [whole("blue", "green", "green")]
    made = pair_up([question("red")], samples, {0: whole("gray")[0]}, "exact_match", per_question=2)
    records = [pair_record(pair, None) for pair in made.pairs]
    assert [(record["id"], record["rejected"]) for record in records] == [
        ("1/sampled", "green"),
        ("1/sampled/2", "blue"),
        ("1/other_image", "gray"),
    ]


@pytest.mark.parametrize(("at_least", "rejected"), [(1, ["green", "blue"]), (2, ["green"]), (3, [])])
def test_rare_wrong_answers_make_no_pair(at_least: int, rejected: list[str]) -> None:
    samples = whole("blue", "red", "green", "Green")
    made = pair_up([question("red")], [samples], {}, "exact_match", per_question=2, at_least=at_least)
    assert [pair.rejected for pair in made.pairs] == rejected
    assert (made.all_right, made.unusable, made.too_rare) == (0, 0, int(not rejected))


def test_an_answer_to_another_image_is_rejected_unless_right_or_known() -> None:
    asked = [question("red"), question("red"), question("red"), question("red")]
    samples = [whole("red"), whole("red"), whole("blue"), whole("green")]
    others = dict(enumerate(whole("blue", "RED", "Blue", "blue")))
    made = pair_up(asked, samples, others, "exact_match")
    assert [pair.question is asked[index] for pair, index in zip(made.pairs, (0, 2, 3, 3), strict=True)] == [True] * 4
    assert kinds(list(made.pairs)) == [
        ("other_image", "blue", 1),
        ("sampled", "blue", 1),
        ("sampled", "green", 1),
        ("other_image", "blue", 1),
    ]
    assert (made.num_questions, made.all_right, made.unusable) == (4, 1, 0)


@pytest.mark.parametrize("sample", [Sample("blu", is_cut=True), *whole("", "  ", "<image> blue")])
def test_answers_that_cannot_be_trained_on_make_no_pair(sample: Sample) -> None:
    made = pair_up([question("red")], [[sample]], {0: sample}, "exact_match")
    assert (list(made.pairs), made.all_right, made.unusable) == ([], 0, 1)
    made = pair_up([question("red")], [[sample, *whole("blue")]], {0: sample}, "exact_match")
    assert (kinds(list(made.pairs)), made.unusable) == ([("sampled", "blue", 1)], 0)


@pytest.mark.parametrize(
    ("metric", "references", "text", "wrong"),
    [
        ("exact_match", ("two",), "2", False),
        ("exact_match", ("two", "three"), "three", False),
        ("exact_match", ("two",), "three", True),
        ("token_f1", ("a large red shape",), "a red shape", False),
        ("token_f1", ("a large red shape",), "a small blue shape here", True),
        # Of ten different references each scores 0.3; the first is the chosen answer.
        ("vqa_v2", tuple("abcdefghij"), "b", True),
        ("vqa_v2", tuple("bcdefghija"), "B", False),
    ],
)
def test_wrong_is_below_half_and_never_the_chosen_answer(
    metric: Metric, references: tuple[str, ...], text: str, wrong: bool
) -> None:
    assert is_wrong(metric, question(*references), text) == wrong
