"""Scores of answers: exact match, VQA v2 and token F1; accuracy by type of question; paired differences."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from lora_llava.evaluation.scoring.exact_match import answer_tokens, exact_match
from lora_llava.evaluation.scoring.vqa_v2 import normalize_answer, vqa_v2
from lora_llava.recipe.choices import Metric, MetricSetting

METRIC_NAMES: dict[Metric, str] = {"exact_match": "exact match", "vqa_v2": "VQA v2", "token_f1": "token F1"}
_LONG_REFERENCE = 5
"""Words. If at least half of the references have more, `auto` is token F1."""

ALL = "all"
YES_NO = "yes/no"
NUMBER = "number"
OTHER = "other"
CLOSED = "closed"
_OPEN = "open"
GROUPS = (ALL, CLOSED, _OPEN, YES_NO, NUMBER, OTHER)
"""Groups of questions, in the order reported. Closed is yes/no; open is the rest."""

_NUMBER = re.compile(r"\d+(\.\d+)?")
_Z = 1.96


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A mean score, or share of right answers, with the bounds of its 95 % Wilson interval (between 0 and 1)."""

    correct: float
    """Right answers; of a metric with partial credit the sum of the scores."""
    total: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Right answers over questions; 0 if there was no question."""
        return self.correct / self.total if self.total else 0.0

    @classmethod
    def of(cls, correct: float, total: int) -> Accuracy:
        """Return the accuracy of `correct` out of `total`, with its interval."""
        return cls(correct, total, *wilson_interval(correct, total))

    @classmethod
    def of_scores(cls, scores: Sequence[float]) -> Accuracy:
        """Return the mean score; with partial credit, its interval is a conservative one."""
        total = sum(scores)
        return cls.of(int(total) if float(total).is_integer() else total, len(scores))


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean of paired differences of scores, between -1 and 1, with its 95 % interval."""

    mean: float
    low: float
    high: float
    questions: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def in_points(self) -> dict[str, float]:
        """Return `points`, `low` and `high` in percentage points, with two decimals."""
        values = {"points": self.mean, "low": self.low, "high": self.high}
        return {name: round(100 * value, 2) for name, value in values.items()}


def token_f1(prediction: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall of the reference's words, each counted as often as it occurs.

    SQuAD's F1 (Rajpurkar et al., 2016), over the tokens of `answer_tokens`.
    """
    given, expected = answer_tokens(prediction), answer_tokens(reference)
    if not given or not expected:
        return float(exact_match(prediction, reference))
    shared = sum((Counter(given) & Counter(expected)).values())
    return 2 * shared / (len(given) + len(expected))


def score_answer(metric: Metric, prediction: str, references: Sequence[str]) -> float:
    """Score an answer between 0 and 1; the best of several references counts (for VQA v2, see `vqa_v2`)."""
    if metric == "vqa_v2":
        return vqa_v2(prediction, references)
    if metric == "token_f1":
        return max(token_f1(prediction, reference) for reference in references)
    return float(any(exact_match(prediction, reference) for reference in references))


def pick_metric(setting: MetricSetting, references: Sequence[str]) -> Metric:
    """Resolve `auto` by the length of the references."""
    if setting != "auto":
        return setting
    words = [len(reference.split()) for reference in references]
    return "token_f1" if words and median(words) > _LONG_REFERENCE else "exact_match"


def is_void(metric: Metric, reference: str) -> bool:
    """Return whether a reference normalizes to nothing, so that no answer can match its meaning."""
    return not (normalize_answer(reference) if metric == "vqa_v2" else answer_tokens(reference))


def answer_type(answer: str) -> str:
    """Classify a reference answer as "yes/no", "number" or "other"."""
    tokens = answer_tokens(answer)
    if tokens in {("yes",), ("no",)}:
        return YES_NO
    unsigned = tokens[1:] if tokens[:1] in {("-",), ("+",)} else tokens
    return NUMBER if len(unsigned) == 1 and _NUMBER.fullmatch(unsigned[0]) else OTHER


def answer_groups(answer: str) -> tuple[str, ...]:
    """Return the groups of a question with this reference; without an answer, only `ALL`."""
    if not answer.strip():
        return (ALL,)
    kind = answer_type(answer)
    return ALL, CLOSED if kind == YES_NO else _OPEN, kind


def wilson_interval(correct: float, total: int) -> tuple[float, float]:
    """Return the bounds of the 95 % Wilson score interval of `correct` out of `total`; (0, 1) if `total` is 0.

    Raises ValueError unless 0 <= correct <= total.
    """
    if not 0 <= correct <= total:
        raise ValueError(f"correct must be between 0 and total; got correct={correct}, total={total}")
    if total == 0:
        return 0.0, 1.0
    share, z = correct / total, _Z
    scale = 1 + z * z / total
    center = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    # The bounds of 0 and of all are exactly 0 and 1; do not let rounding change that.
    return 0.0 if correct == 0 else center - half, 1.0 if correct == total else center + half


def accuracy_by_type(scores: Sequence[float], answers: Sequence[str]) -> dict[str, Accuracy]:
    """Return accuracies by the type of the reference, for the groups of `GROUPS` that have questions.

    Raises ValueError if the numbers of scores and answers differ.
    """
    if len(scores) != len(answers):
        raise ValueError(f"got {len(scores)} scores for {len(answers)} answers")
    grouped: dict[str, list[float]] = {ALL: []}
    for score, answer in zip(scores, answers, strict=True):
        for group in answer_groups(answer):
            grouped.setdefault(group, []).append(score)
    return {group: Accuracy.of_scores(grouped[group]) for group in GROUPS if group in grouped}


def accuracy_by_value(scores: Sequence[float], values: Sequence[str]) -> dict[str, Accuracy]:
    """Return accuracies by a value of each question, most frequent value first."""
    grouped: dict[str, list[float]] = {}
    for score, value in zip(scores, values, strict=True):
        grouped.setdefault(value, []).append(score)
    ordered = sorted(grouped, key=lambda value: (-len(grouped[value]), value))
    return {value: Accuracy.of_scores(grouped[value]) for value in ordered}


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Return the mean of first minus second on the same questions, with a 95 % interval.

    The interval of Agresti and Min (2005) for paired proportions, which adds half a count to each of the four cells.
    Raises ValueError if the numbers of scores differ, or there are none.
    """
    gaps = [score - other for score, other in zip(first, second, strict=True)]
    if not gaps:
        raise ValueError("a difference needs at least one question")
    total, count = sum(gaps), len(gaps) + 2
    spread = math.sqrt(sum(gap * gap for gap in gaps) + 1 - total * total / count) / count
    low, high = total / count - _Z * spread, total / count + _Z * spread
    return Difference(total / len(gaps), max(-1.0, low), min(1.0, high), len(gaps))


def majority_answers(answers: Sequence[str]) -> list[str]:
    """Return, for each reference, the most frequent reference of its type: a baseline without a model."""
    counts: dict[str, Counter[tuple[str, ...]]] = {}
    spelled: dict[tuple[str, ...], str] = {}
    for answer in answers:
        counts.setdefault(answer_type(answer), Counter())[answer_tokens(answer)] += 1
        spelled.setdefault(answer_tokens(answer), answer)
    most_frequent = {kind: spelled[counter.most_common(1)[0][0]] for kind, counter in counts.items()}
    return [most_frequent[answer_type(answer)] for answer in answers]
