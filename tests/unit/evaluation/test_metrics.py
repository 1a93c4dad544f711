from __future__ import annotations

import subprocess
import sys

import pytest

from lora_llava.evaluation.scoring.exact_match import exact_match
from lora_llava.evaluation.scoring.metrics import (
    Accuracy,
    Difference,
    accuracy_by_type,
    accuracy_by_value,
    answer_groups,
    answer_type,
    difference,
    is_void,
    majority_answers,
    pick_metric,
    score_answer,
    token_f1,
    wilson_interval,
)
from lora_llava.evaluation.scoring.vqa_v2 import normalize_answer, vqa_v2
from lora_llava.recipe.choices import Metric

# Worked out by hand from the published rules: processPunctuation, then processDigitArticle.
GOLDEN = {
    "": "",
    "Yes": "yes",
    "Yes.": "yes",
    "  Yes\n": "yes",
    "yes,": "yes",
    "No, it is not.": "no it is not",  # "," next to a space goes without leaving one
    "black/white": "black white",
    "black / white": "black white",
    "x-ray": "x ray",
    "x-ray, chest": "x ray chest",  # each mark is judged by itself
    "x-ray- left": "xray left",  # a mark next to a space goes everywhere without leaving one
    "x-ray -left": "xray left",
    "x-ray\t-left": "xray left",
    "x-ray\n-left": "xray left",
    "1,000": "1000",
    "1,000 left-sided": "1000 leftsided",  # a comma in a number makes every mark go without a space
    "2.5 cm.": "2.5 cm",
    ".5": ".5",
    "5.": "5",
    "e.g. this": "eg this",
    "The left lung": "left lung",
    "a an the": "",
    "THE cat and a dog": "cat and dog",
    "two": "2",
    "None": "0",
    "Ten lobes": "10 lobes",
    "eleven": "eleven",
    "twenty one": "twenty 1",
    "dont know": "don't know",
    "don't know": "don't know",
    "couldnt've": "couldn't've",
    "couldn'tve": "couldn't've",
    "couldntve": "couldntve",  # two apostrophes lost: not in the official table
    "yalld've": "yalld've",
    "yall'd've": "y'all'd've",
    "Im": "im",  # the official table has "Im", but looks words up in lower case
    "its": "its",
    "somebody'd": "somebodyd",
    "Anterior\tand\nposterior": "anterior and posterior",
    "what?!": "what",
    "(left) [side]": "left side",
    "$5 & 50%": "$5 & 50%",
    "it's": "it's",
    "Café": "café",
}


@pytest.mark.parametrize("text", GOLDEN)
def test_normalization_follows_the_official_rules(text: str) -> None:
    assert normalize_answer(text) == GOLDEN[text]


@pytest.mark.parametrize("text", GOLDEN)
def test_references_match_themselves(text: str) -> None:
    for equal in (exact_match, lambda one, other: vqa_v2(one, [other])):
        assert equal(text, text)
        assert equal(f" {text.upper()}", text)


def test_exact_match_is_strict_about_words() -> None:
    assert exact_match("The right lung.", "right lung")
    assert not exact_match("right lung base", "right lung")
    assert not exact_match("normal", "no")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes/no"),
        ("no.", "yes/no"),
        ("not seen", "other"),
        ("two", "number"),
        ("none", "other"),
        ("-3", "number"),
        ("+3", "number"),
        ("<5", "other"),
        ("1/2", "other"),
        ("12", "number"),
        ("2.5", "number"),
        ("5.", "number"),
        (".5", "number"),
        ("1,000", "number"),
        ("2 cm", "other"),
        ("t2", "other"),
        ("", "other"),
    ],
)
def test_answer_type(answer: str, expected: str) -> None:
    assert answer_type(answer) == expected


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_interval_gives_published_values(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=1e-4)


def test_wilson_interval_is_bounded_and_symmetric() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for total in (1, 3, 451):
        for correct in range(total + 1):
            low, high = wilson_interval(correct, total)
            assert 0.0 <= low <= correct / total <= high <= 1.0
            mirrored = wilson_interval(total - correct, total)
            assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]))


@pytest.mark.parametrize(("correct", "total"), [(-1, 3), (4, 3)])
def test_wilson_interval_refuses_impossible_counts(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"correct={correct}, total={total}"):
        wilson_interval(correct, total)


def test_accuracy_by_type_counts_each_group() -> None:
    answers = ["Yes", "yes", "2", "right", "heart"]
    given = ["yes", "No.", "two", "left", "the heart"]
    table = accuracy_by_type([exact_match(*pair) for pair in zip(given, answers, strict=True)], answers)
    assert {group: (a.correct, a.total) for group, a in table.items()} == {
        "all": (3, 5),
        "closed": (1, 2),
        "open": (2, 3),
        "yes/no": (1, 2),
        "number": (1, 1),
        "other": (1, 2),
    }
    assert list(table) == ["all", "closed", "open", "yes/no", "number", "other"]
    assert table["all"] == Accuracy(3, 5, *wilson_interval(3, 5))
    assert table["all"].share == pytest.approx(0.6)


def test_accuracy_by_type_leaves_out_empty_groups_but_never_all() -> None:
    assert list(accuracy_by_type([0], ["left"])) == ["all", "open", "other"]
    assert accuracy_by_type([], []) == {"all": Accuracy(0, 0, 0.0, 1.0)}
    assert accuracy_by_type([], [])["all"].share == 0.0


def test_accuracy_by_type_refuses_different_lengths() -> None:
    with pytest.raises(ValueError, match="got 1 scores for 2 answers"):
        accuracy_by_type([1], ["yes", "no"])


def test_k38_a_question_without_an_answer_has_no_type() -> None:
    assert answer_groups(" ") == ("all",)
    assert answer_groups("none") == ("all", "open", "other")


def test_vqa_v2_is_the_official_rule() -> None:
    assert vqa_v2("-3", ["3"]) == 1, "its own normalization takes signs away"
    assert vqa_v2("", ["A"]) == 1
    answers = ["red"] * 2 + ["Red."] + ["dark red"] * 7
    # Two of the ten count two other matches each if they gave it themselves: min(1, 2/3) three times, 1 seven times.
    assert vqa_v2("red", answers) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert vqa_v2("blue", answers) == 0
    assert vqa_v2("the dark red", answers) == 1
    # Where all agree the official tool compares the texts as they are.
    assert vqa_v2("Yes.", ["yes"] * 10) == 0
    assert vqa_v2("yes", ["yes"] * 10) == 1
    # Its call takes 32 periods away, re.UNICODE being given as the count.
    assert normalize_answer("x" + "." * 40) == "x" + "." * 8


def test_k32_partial_credit_is_summed() -> None:
    table = accuracy_by_type([0.5, 0.25], ["left", "right"])
    assert (table["all"].correct, table["all"].total, table["all"].share) == (0.75, 2, 0.375)
    whole = accuracy_by_type([0.5, 0.5], ["left", "right"])["all"]
    assert isinstance(whole.correct, int)
    assert (whole.correct, whole.total) == (1, 2)


def test_k32_accuracy_by_value_lists_the_most_frequent_first_then_by_name() -> None:
    table = accuracy_by_value([1, 0, 1, 0, 0, 1, 1], ["z", "b", "a", "b", "z", "z", "a"])
    assert [(value, one.correct, one.total) for value, one in table.items()] == [("z", 2, 3), ("a", 2, 2), ("b", 0, 2)]
    with pytest.raises(ValueError, match="zip"):
        accuracy_by_value([1, 0], ["a"])


def test_k32_each_metric_has_a_score_of_its_own() -> None:
    scores = {
        metric: (score_answer(metric, "left lung clear", ["left lung"]), score_answer(metric, "-3", ["3"]))
        for metric in ("exact_match", "vqa_v2", "token_f1")
    }
    # Of the five words two are shared twice; VQA v2 takes the sign away, token F1 counts it as a word.
    assert scores == {"exact_match": (0, 0), "vqa_v2": (0, 1), "token_f1": (0.8, pytest.approx(2 / 3))}


def test_k32_a_void_reference_is_one_that_the_metric_normalizes_to_nothing() -> None:
    assert [is_void("vqa_v2", text) for text in ("the", "?", "a lung")] == [True, True, False]
    assert [is_void("exact_match", text) for text in ("the", "?", "a lung")] == [False, True, False]


def test_several_references_score_by_the_best() -> None:
    for metric in ("exact_match", "vqa_v2", "token_f1"):
        assert score_answer(metric, "a lung", ["heart", "the lung"]) == 1
        assert score_answer(metric, "a bone", ["heart", "the lung"]) == 0


@pytest.mark.parametrize("given", [" yes", "yes\n", "\tyes "])
def test_ten_equal_answers_are_compared_as_written_but_for_space_around_them(given: str) -> None:
    assert vqa_v2(given, ["yes"] * 10) == 1
    assert vqa_v2(f"{given}.", ["yes"] * 10) == 0
    assert vqa_v2("left\tlung", ["left lung"] * 10) == vqa_v2("left\nlung", ["left lung"] * 10) == 1


def test_two_answers_of_ten_annotators_are_normalized() -> None:
    assert vqa_v2("Yes.", ["yes"] * 9 + ["no"]) == 1


def test_token_f1_of_texts_without_words_is_that_of_exact_match() -> None:
    assert token_f1("!", "!") == token_f1("", " ") == 1
    assert token_f1("!", "?") == token_f1("!", "lung") == token_f1("lung", "!") == 0


@pytest.mark.parametrize("metric", ["exact_match", "vqa_v2", "token_f1"])
def test_a_score_is_a_float(metric: Metric) -> None:
    """In JSON, a bool would be `true` instead of 1.0."""
    assert {type(score_answer(metric, answer, ["lung"])) for answer in ("lung", "!", "")} == {float}


@pytest.mark.parametrize(
    ("low", "high", "is_clear"), [(0.0, 0.2, False), (-0.2, 0.0, False), (1e-9, 0.2, True), (-0.2, -1e-9, True)]
)
def test_an_interval_that_touches_0_is_not_clear(low: float, high: float, is_clear: bool) -> None:
    assert Difference(0.0, low, high, 9).is_clear == is_clear


def test_token_f1_counts_words() -> None:
    assert token_f1("The left lung is clear.", "left lung") == pytest.approx(2 * 2 / 6)
    assert token_f1("lung lung lung", "lung") == pytest.approx(2 * 1 / 4), "repeating a word earns nothing"
    assert token_f1("", "lung") == 0
    assert token_f1("-3", "3") == pytest.approx(2 / 3)


def test_auto_takes_the_metric_that_fits_the_references() -> None:
    assert pick_metric("auto", ["yes", "the left lung is clear of any mass"]) == "exact_match"
    assert pick_metric("auto", ["the left lung is clear of any mass"]) == "token_f1"
    assert pick_metric("vqa_v2", ["the left lung is clear of any mass"]) == "vqa_v2"
    assert pick_metric("auto", ["the left lung is clear"]) == "exact_match"
    assert pick_metric("auto", []) == "exact_match"
    assert pick_metric("auto", ["the left lung is quite clear"]) == "token_f1"


def test_the_majority_answer_is_that_of_the_type() -> None:
    assert majority_answers(["yes", "Yes.", "no", "2", "red", "two"]) == ["yes", "yes", "yes", "2", "red", "2"]
    assert majority_answers(["no", "yes", "Yes.", "red"]) == ["yes", "yes", "yes", "red"]


def test_a_difference_is_of_pairs() -> None:
    same = difference([1, 0, 1, 0], [1, 0, 1, 0])
    assert (same.mean, same.is_clear, same.questions) == (0, False, 4)
    # Agresti and Min (2005): n + 2 questions, half a discordant one on each side.
    better = difference([1] * 30 + [0] * 10, [0] * 30 + [0] * 9 + [1])
    assert better.mean == pytest.approx(29 / 40)
    half = 1.96 * ((32 - 29 * 29 / 42) ** 0.5) / 42
    assert (better.low, better.high) == pytest.approx((29 / 42 - half, 29 / 42 + half))
    assert better.is_clear
    assert not difference([1, 1, 0], [0, 0, 1]).is_clear
    # One question gives bounds of (1 +- 1.96 * sqrt(5 / 3)) / 3, of which a difference can only reach 1.
    low = (1 - 1.96 * (5 / 3) ** 0.5) / 3
    assert (difference([1], [0]).low, difference([1], [0]).high) == (pytest.approx(low), 1)
    assert (difference([0], [1]).low, difference([0], [1]).high) == (-1, pytest.approx(-low))
    with pytest.raises(ValueError, match="at least one"):
        difference([], [])
    with pytest.raises(ValueError, match="zip"):
        difference([1, 0], [1])


def test_metrics_need_no_torch() -> None:
    code = "import sys, lora_llava.evaluation.scoring.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
