"""The equality by which answers are scored: lenient about writing, strict about meaning."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_llava.evaluation.scoring.exact_match import answer_tokens, exact_match, holds_answer

DIFFERENT = [
    ("", "A"), ("the", "A"), ("a an the", ""), ("", "the"), ("?", ""), ("...", "?"), ("-", "+"),
    ("-3", "3"), ("+5", "5"), ("\u22123", "3"), ("\u20133", "3"), ("minus 3", "3"), ("-2 to 3", "2 to 3"),
    ("\u00b15", "5"),
    ("<5", ">5"), ("\u22645", "<5"), ("!=5", "=5"), ("~5", "5"), ("#3", "3"),
    ("1/2", "1-2"), ("1/2", "12"), ("\u00bd", "12"), ("1\u00bd", "11/2"), ("1:2", "12"), ("10:30", "1030"),
    ("3-4", "34"), ("1 2", "12"), ("1,2", "12"), ("1,2", "1.2"), ("1.2.3", "123"), ("(1,2)", "[1,2]"),
    ("50%", "50"), ("1.5", "15"), ("0.5", "5"), ("100,000", "100.000"), ("1e5", "1e-5"), ("10^3", "103"),
    ("10\u00b3", "103"), ("$5", "5"), ("5\u00b0", "5"), ("5'", '5"'), ("5 mg", "5"), ("5 mg", "5 g"), ("m/s", "m s"),
    ("A+", "A-"), ("A-", "A"), ("ER+", "ER-"), ("-ve", "+ve"), ("none", "0"), ("no", "not"), ("normal", "no"),
    ("vitamin A", "vitamin"), ("hepatitis a", "hepatitis"), ("right lung base", "right lung"),
    ("1 and 1/2", "1, 1/2"), ("1 and 2", "12"), ("[1, 2)", "1, 2"), ("1e3", "1e4"), ("3x4", "3 4"), ("5 um", "5 mm"),
    ("x/-y", "x/y"), ("x-/y", "x/y"), ("the smear -ve", "the smear ve"), ("1, -2", "1 -2"), ("1, -2 mg", "1 -2 mg"),
    ("1, 2 mg", "1 2 mg"), ("plus size", "+size"), ("vitamin a deficiency", "vitamin deficiency"), ("a b c", "b c"),
    ("1.2.30", "1.2.3"), ("10.1.0", "10.1"), ("100", "1"), ("0.05", "0.5"), ("1 and 2", "1 2"), ("5 minus", "5-"),
    ("a. cat", "cat"),
]  # fmt: skip
SAME = [
    ("Yes.", "yes"), ("The left lung", "left lung"), ("x-ray", "X ray"), ("left_lung", "left lung"),
    ("Caf\u00e9", "cafe\u0301"),
    ("a cat and a dog", "cat and dog"), ("(left) [side]", "left side"), ('"left"', "left"), ("**left**", "left"),
    ("Answer: yes", "yes"), ("The answer is yes.", "yes"), ("dont know", "don't know"), ("It\u2019s", "it's"),
    ("U.S.", "US"), ("e.g. this", "eg this"), ("black / white", "black/white"), ("5-year", "5 year"),
    ("1,000", "1000"), ("3.0", "3"), (".5", "0.5"), ("two", "2"), ("eleven", "11"), ("\u0663", "3"),
    ("\u22123", "-3"), ("\u20133", "-3"), ("- 3", "-3"), ("minus 3", "-3"), ("3 \u2013 4", "3-4"), ("\u2264 5", "<=5"),
    ("50 %", "50%"), ("50 percent", "50%"), ("\u00bd", "1/2"), ("1 / 2", "1/2"), ("1, 2, 3", "1,2,3"), ("5mg", "5 mg"),
    ("cm\u00b2", "cm^2"), ("", "  "), ("?", " ?"),
    ("3 x 4 cm", "3x4 cm"), ("3x4", "3 \u00d7 4"), ("5 \u00b5m", "5 um"), ("5\u03bcm", "5 um"), ("[1, 2]", "1, 2"),
    ("1 and 2", "1, 2"), ("1, 2, and 3", "1,2,3"), ("1e3", "1000"), ("2.5E-3", "0.0025"), ("1e+3", "1,000"),
    ("2.50", "2.5"), (": 5", "5"), ("x - y", "x y"), ("- left", "left"), ("left, right", "left right"),
    ('the "left" lung', "the left lung"), ("minus 3.5", "-3.5"), ("pneu\u00admonia", "pneumonia"),
    ("1.5 and 2", "1.5, 2"), ("the 1.5", "1.5"), ("a CT scan", "CT scan"), ("vitamin A .", "vitamin A"),
    ("0.0", "0"), (".0", "0"), (".50", "0.5"), ("1,000.0", "1000"), ("10.10", "10.1"), ("1 and minus 3", "1 and -3"),
    ("minus 3 mg", "-3 mg"),
]  # fmt: skip
OPTIONS = [
    "A", "a", "A.", "(A)", "A)", "[A]", " a ", "**A**", "'A'", "Answer: A", "The answer is A.", "Option A",
    "option (a)", "A. Pneumonia", "A: pneumonia", "A:pneumonia", "A) Pneumonia", "(A) Pneumonia", "A - Pneumonia",
    "A\nPneumonia", "A. 5", "A) 5 mm", "A. Vitamin D.", "A is correct", "The correct answer is (A) Pneumonia",
    "Answer: A. Pneumonia", "\uff08A\uff09", "\uff21", "A\uff0e", "A,",
    "A, pneumonia", r"\boxed{A}", r"$\boxed{\text{A}}$", "$A$", "<A>", "A\u2013Pneumonia", "Answer - A", "### A",
    "So the answer is A", "A; Pneumonia", "option a: x", "It is A", "It is A.", "I think A", "I think it is (A)",
    "A\u3001\u80ba\u708e", "A.\nBecause of B. x", "A. Pneumonia\nBecause of B. x", "A. Hepatitis A and B", "A: x",
    "A, vitamin D", "A) pneumonia", "**A.** Pneumonia", "**A**. Pneumonia", "**Answer:** A", "*A.* Pneumonia",
    "__A)__ Pneumonia", "The answer is **A**", "**Answer: A.** Pneumonia", "***A.*** Pneumonia is **likely**",
    "$A$.", "A. Pneumonia, so A) it is.", "A. Pneumonia\nA. It is pneumonia.",
]  # fmt: skip
NO_OPTION_A = [
    "", "the", "The answer", "B", "B. Pneumonia", "A, B", "A and B", "A/B", "A. B", "A-", "A+", "a cat", "A pneumonia",
    "AB", "a.m.", "x-ray", "A.5", "A. Pneumonia B. Fracture", "A. Pneumonia\nB. Fracture", "A) no\nB) yes", "Aorta",
    "1", "A - no, B - yes",
    "A. x, C. y", "A) x D) y", "(A) x (C) y", "A) no\nC) yes", "A. Pneumonia or C. Edema", "A. Pneumonia and B",
    "A) or B)", "A. or B.", "A. is wrong", "A) is wrong", "A is the correct answer? no", "A. baumannii", "A, C",
    "A. Pneumonia, C", "A. Pneumonia C. Edema", "A\nB", "A, B and C", "A\u2013C", "It is a", "It is not A", "A, B.",
    "**A.** Pneumonia **B.** Fracture", "**A** or **B**", "**A** pneumonia", "**E.** x",
    "A; x", "A, x", "A.15",
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_k12_different_meanings_are_different(one: str, other: str) -> None:
    assert not exact_match(one, other)
    assert not exact_match(other, one)


@pytest.mark.parametrize(("one", "other"), SAME)
def test_k12_another_way_of_writing_is_the_same(one: str, other: str) -> None:
    assert exact_match(one, other)
    assert exact_match(other, one)


@pytest.mark.parametrize("answer", OPTIONS)
def test_k12_a_reference_of_one_letter_is_an_option(answer: str) -> None:
    for reference in ("A", "a", "(A)", "A."):
        assert exact_match(answer, reference)
        assert exact_match(reference, answer)
    assert not exact_match(answer, "B")
    assert not exact_match(answer, "C. Fracture")


@pytest.mark.parametrize("answer", NO_OPTION_A)
def test_k12_what_does_not_name_the_option_is_wrong(answer: str) -> None:
    assert not exact_match(answer, "A")
    assert not exact_match("A", answer)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("E. coli", "E"), ("e. coli", "E"), ("C. difficile", "C"), ("I. think", "I"), ("I think", "I")],
)
def test_k12_a_lower_case_word_behind_a_full_stop_is_no_option(answer: str, letter: str) -> None:
    assert not exact_match(answer, letter)
    assert not exact_match(letter, answer)


@pytest.mark.parametrize("answer", ["So the answer is B", "The answer is B.", "B; Pneumonia", "option b: x"])
def test_k12_other_letters_are_options_too(answer: str) -> None:
    assert exact_match(answer, "B")
    assert not exact_match(answer, "A")


@pytest.mark.parametrize(
    "answer", ["\u0130. Pneumonia", "(\u0130) Pneumonia", "\u0131) Pneumonia", "\u017f. Pneumonia"]
)
def test_k12_a_letter_of_another_alphabet_is_no_option(answer: str) -> None:
    # The dotted I, the dotless i and the long s, which equal i and s to a search without regard to case.
    for reference in ("A", "I", "S"):
        assert not exact_match(answer, reference)
        assert not exact_match(reference, answer)


def test_k12_the_next_letter_is_another_option_beyond_the_usual_five_too() -> None:
    assert exact_match("F. Pneumonia", "F")
    assert not exact_match("F. Pneumonia G. Edema", "F")


def test_k32_tokens_keep_a_last_article_and_an_and_after_a_word() -> None:
    assert answer_tokens("by the .") == ("by", "the")
    assert answer_tokens("cats and 2 dogs") == ("cats", "and", "2", "dogs")
    assert answer_tokens("1 and 2 dogs") == ("1", ",", "2", "dogs")


def test_k12_saying_nothing_is_right_about_nothing() -> None:
    for reference in ("A", "B", "C", "D", "the", "an", "none", "?", "-", "no"):
        assert not exact_match("", reference)


TEXT = st.text(alphabet="aAbtheno 0123456789.,-+<>=/%:()'\"?\n\u2212\u00bd", max_size=12)


@given(TEXT | st.text(max_size=12), TEXT | st.text(max_size=12))
def test_k12_equality_is_symmetric(one: str, other: str) -> None:
    assert exact_match(one, other) == exact_match(other, one)


@given(TEXT | st.text(max_size=20))
def test_k12_every_answer_equals_itself(text: str) -> None:
    assert exact_match(text, text)
    assert exact_match(f" {text}\n", text)
    assert answer_tokens(text) == answer_tokens(f"  {text} ")


NUMBERS = st.from_regex(r"[-+<>=]?[1-9][0-9]{0,3}(\.[0-9]?[1-9])?([-/:][-]?[1-9]?)?( ?%| mg)?", fullmatch=True)


@given(NUMBERS, NUMBERS)
def test_k12_equal_numbers_have_the_same_digits_and_signs(one: str, other: str) -> None:
    if exact_match(one, other):
        # A colon counts between digits: `1:2` is a ratio, `1: mg` is 1 mg.
        kept = [re.sub(r"[\s:.]+$|\s|(?<!\d):|:(?!\d)", "", text) for text in (one, other)]
        assert kept[0] == kept[1]


@given(st.integers(0, 10**7), st.sampled_from("-+<>~"))
def test_k12_a_sign_in_front_counts_and_a_separator_does_not(number: int, sign: str) -> None:
    assert exact_match(f"{number:,}", str(number))
    assert not exact_match(f"{sign}{number}", str(number))


def test_a_sentence_can_hold_the_answer() -> None:
    assert holds_answer("Yes, there is a circle.", "yes")
    assert holds_answer("It lies in the left lung.", "the left lung")
    assert not holds_answer("The lung is normal.", "no")
    assert not holds_answer("It is -3.", "3")
    assert not holds_answer("It is 3%.", "3")
    assert holds_answer("There are 3 of them.", "3")
    assert not holds_answer("anything", "?")
    assert holds_answer("I think it is B.", "B")
    assert not holds_answer("It is not red", "red")
    assert not holds_answer("It isn't the left lung.", "left lung")
    assert not holds_answer("It is not (B).", "B")
    assert holds_answer("It is not red", "not red")
    assert holds_answer("No, red.", "red")
    assert holds_answer("It is not red but blue or red.", "red")
    assert not holds_answer("A circle is shown.", "A")
    assert holds_answer("It is **B**.", "B")
    assert not holds_answer("Not red", "red")
    assert not holds_answer("No, not red.", "red")
    # A sign counts next to the number, not further away.
    assert not holds_answer("-3", "3")
    assert not holds_answer("3 % of them", "3")
    assert holds_answer("For x > y 3 are left.", "3")
    assert holds_answer("3 are > 2", "3")


@pytest.mark.parametrize(
    "piece", ["'", '"', "(", "1,111,", "1,", "-", "a. ", ".", "[1,", " \u2013 ", "*_", "\u00bd", "x"]
)
def test_the_time_for_an_answer_grows_with_its_length_alone(piece: str) -> None:
    for length in (9_000, 1_000_000):
        text = piece * (length // len(piece))
        clock = time.process_time()
        assert exact_match(text, text)
        exact_match(text, "A")
        holds_answer(text, "1,000")
        assert time.process_time() - clock < 2
