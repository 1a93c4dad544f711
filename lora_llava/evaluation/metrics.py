"""Scores of short answers: the VQA v2 normalisation, exact match, accuracy by kind of answer.

An answer counts as right if it equals the reference after the normalisation of the official VQA v2
evaluation, applied to both sides. (The official tool leaves references alone where all ten annotators agree;
data sets with one reference have no such distinction.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

ALL = "all"
YES_NO = "yes/no"
NUMBER = "number"
OTHER = "other"
CLOSED = "closed"
OPEN = "open"
GROUPS = (ALL, CLOSED, OPEN, YES_NO, NUMBER, OTHER)
"""Groups of questions, in the order reported. Closed is what medical papers call yes/no; open is the rest."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The official pattern has a look-behind too, but it is misspelt and changes nothing.
_PERIOD = re.compile(r"\.(?!\d)")
_NUMBER = re.compile(r"\d+(\.\d+)?|\.\d+")
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


_CONTRACTIONS = _restored_apostrophes()


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A share of right answers, with the bounds of its 95 % Wilson interval (all between 0 and 1)."""

    correct: int
    total: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Right answers over questions; 0 if there was no question."""
        return self.correct / self.total if self.total else 0.0

    @classmethod
    def of(cls, correct: int, total: int) -> Accuracy:
        """Count `correct` of `total` and work out the interval."""
        return cls(correct, total, *wilson_interval(correct, total))


def normalize_answer(text: str) -> str:
    """Normalise an answer as the official VQA v2 evaluation does.

    Lower case; no punctuation, no articles; number words to ten as digits; lost apostrophes put back.
    """
    text = _strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = (_NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _strip_punctuation(text: str) -> str:
    # A mark parts words ("black/white"); next to a space, or in an answer with "1,000", it just goes.
    comma_in_number = _COMMA_IN_NUMBER.search(text) is not None
    stripped = text
    for mark in _PUNCTUATION:
        beside_space = mark + " " in text or " " + mark in text
        stripped = stripped.replace(mark, "" if comma_in_number or beside_space else " ")
    return _PERIOD.sub("", stripped)


def exact_match(prediction: str, answer: str) -> bool:
    """Tell whether two answers are the same after normalisation."""
    return normalize_answer(prediction) == normalize_answer(answer)


def answer_type(answer: str) -> str:
    """Classify a reference answer as "yes/no", "number" or "other"."""
    normalized = normalize_answer(answer)
    if normalized in {"yes", "no"}:
        return YES_NO
    return NUMBER if _NUMBER.fullmatch(normalized) else OTHER


def answer_groups(answer: str) -> tuple[str, ...]:
    """Name the groups of `GROUPS` that a question with this reference answer belongs to."""
    kind = answer_type(answer)
    return ALL, CLOSED if kind == YES_NO else OPEN, kind


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the bounds of the Wilson score interval of `correct` out of `total`; (0, 1) if `total` is 0.

    Raises ValueError unless 0 <= correct <= total.
    """
    if not 0 <= correct <= total:
        raise ValueError(f"correct must be between 0 and total; got correct={correct}, total={total}")
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    # At the ends the bound is exactly 0 or 1; rounding must not put it beside.
    return 0.0 if correct == 0 else centre - half, 1.0 if correct == total else centre + half


def accuracy_by_type(predictions: Sequence[str], answers: Sequence[str]) -> dict[str, Accuracy]:
    """Score predictions against reference answers, by those of `GROUPS` that have a question, "all" first.

    Raises ValueError if the numbers of predictions and answers differ.
    """
    if len(predictions) != len(answers):
        raise ValueError(f"got {len(predictions)} predictions for {len(answers)} answers")
    hits: dict[str, list[bool]] = {ALL: []}
    for prediction, answer in zip(predictions, answers, strict=True):
        hit = exact_match(prediction, answer)
        for group in answer_groups(answer):
            hits.setdefault(group, []).append(hit)
    return {group: Accuracy.of(sum(hits[group]), len(hits[group])) for group in GROUPS if group in hits}
