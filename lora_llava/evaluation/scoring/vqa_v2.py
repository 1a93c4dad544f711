"""The score of the official VQA v2 evaluation (github.com/GT-Vision-Lab/VQA, vqaEval.py), rule for rule.

Its normalization drops signs, comparisons and single letters ("-3" becomes "3", "A" becomes nothing). Use it to compare
with published results, and `exact_match` to measure a model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUM_ANNOTATORS = 10
"""Answers per question in VQA v2; with at least these, agreement counts."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The official pattern has a look-behind too, but it is misspelled and changes nothing.
_PERIOD = re.compile(r"\.(?!\d)")
# The official call passes re.UNICODE as the count of `sub`.
_MAX_PERIODS = int(re.UNICODE)
_ARTICLES = frozenset({"a", "an", "the"})
_DIGITS = "zero one two three four five six seven eight nine ten".split()
_NUMBER_WORDS = {"none": "0", **{word: str(number) for number, word in enumerate(_DIGITS)}}

_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've
    mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
    shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
    wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def _restored_apostrophes() -> dict[str, str]:
    """Map each contraction that lacks exactly one apostrophe to its full form."""
    # The official table's one entry that goes the other way.
    table = {"somebody'd": "somebodyd"}
    for word in _CONTRACTED:
        table.update((word[:i] + word[i + 1 :], word) for i, letter in enumerate(word) if letter == "'")
    return table


CONTRACTIONS = _restored_apostrophes()


def vqa_v2(prediction: str, references: Sequence[str]) -> float:
    """Score an answer between 0 and 1.

    With the answers of ten annotators: the mean, over them, of min(1, matches among the nine others / 3); the official
    tool normalizes only where they disagree. With fewer references: 1 if the answer equals one of them normalized.
    """
    if len(references) < _NUM_ANNOTATORS:
        return float(normalize_answer(prediction) in map(normalize_answer, references))
    given, answers = _one_line(prediction), [_one_line(reference) for reference in references]
    if len(set(answers)) > 1:
        given, answers = normalize_answer(given), [normalize_answer(answer) for answer in answers]
    matches = answers.count(given)
    return sum(min(1.0, (matches - (answer == given)) / 3) for answer in answers) / len(answers)


def normalize_answer(text: str) -> str:
    """Normalize an answer as the official VQA v2 evaluation does.

    Lower case; no punctuation, no articles; number words to ten as digits; lost apostrophes put back.
    """
    text = _strip_punctuation(_one_line(text))
    words = (_NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _strip_punctuation(text: str) -> str:
    # A mark separates words ("black/white"); next to a space, or in an answer with "1,000", it is dropped.
    comma_in_number = _COMMA_IN_NUMBER.search(text) is not None
    stripped = text
    for mark in _PUNCTUATION:
        at_space = mark + " " in text or " " + mark in text
        stripped = stripped.replace(mark, "" if comma_in_number or at_space else " ")
    return _PERIOD.sub("", stripped, count=_MAX_PERIODS)
