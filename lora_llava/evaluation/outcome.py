"""The answers of each model with their scores, and the content of `accuracy.json`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lora_llava.data.questions import Question, shared_labels
from lora_llava.evaluation.report import MAJORITY
from lora_llava.evaluation.scoring.confusion import Confusion, confusion
from lora_llava.evaluation.scoring.exact_match import holds_answer
from lora_llava.evaluation.scoring.metrics import (
    ALL,
    Accuracy,
    Difference,
    accuracy_by_type,
    accuracy_by_value,
    difference,
    majority_answers,
    score_answer,
)
from lora_llava.recipe.choices import Metric

BASE, START, TUNED, BLIND = "base", "start", "tuned", "blind"
TUNED_ON_BLIND = "tuned_on_blind_questions"
_TUNED_ON_BASE = "tuned_on_base_questions"
_ValueOf = Callable[[Question], str]


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers of one model to all questions, or to some."""

    indices: Sequence[int]
    """Indices of its questions, ascending."""
    texts: Sequence[str]
    scores: Sequence[float]
    cut: frozenset[int] = frozenset()
    """Indices of the answers that `max_new_tokens` cut short."""

    def by_index(self) -> dict[int, tuple[str, float]]:
        """Map the index of a question to the answer and its score."""
        return dict(zip(self.indices, zip(self.texts, self.scores, strict=True), strict=True))


@dataclass(frozen=True)
class Outcome:
    """All answers of an evaluation."""

    questions: Sequence[Question]
    metric: Metric
    answers: Mapping[str, Answers]
    """By the name of the model; `TUNED` was asked all questions."""

    @cached_property
    def majority(self) -> Answers:
        """The most frequent answer of each type, with its scores."""
        texts = majority_answers([question.answer for question in self.questions])
        return Answers(range(len(texts)), texts, score_all(self.metric, self.questions, texts))

    def table(self, name: str, on: str | None = None) -> dict[str, Accuracy]:
        """Return the accuracies of a model by type of question; `on`: only on the questions of this other model."""
        answers = self.majority if name == MAJORITY else self.answers[name]
        known = answers.by_index()
        indices = answers.indices if on is None else self.answers[on].indices
        scores = [known[index][1] for index in indices]
        return accuracy_by_type(scores, [self.questions[index].answer for index in indices])

    def tables(self) -> dict[str, dict[str, Accuracy]]:
        """Return the accuracies of the majority answer and of each model that was asked with images."""
        return {MAJORITY: self.table(MAJORITY), **{name: self.table(name) for name in self.with_images}}

    def over(self, other: str) -> Difference:
        """Return the score of the tuned model minus that of another, on the questions that both were asked."""
        first = self.answers[TUNED].by_index()
        second = (self.majority if other == MAJORITY else self.answers[other]).by_index()
        indices = [index for index in second if index in first]
        return difference([first[index][1] for index in indices], [second[index][1] for index in indices])

    @property
    def with_images(self) -> list[str]:
        """Names of the models that were asked with images, the tuned one last."""
        return [name for name in (BASE, START, TUNED) if name in self.answers]

    @property
    def compared(self) -> list[str]:
        """Names of what the tuned model is compared with."""
        return [name for name in (BASE, START, MAJORITY, BLIND) if name == MAJORITY or name in self.answers]

    @property
    def has_sources(self) -> bool:
        """Whether the questions are of several sources."""
        return len({question.record.source for question in self.questions}) > 1

    def confusions(self) -> dict[str, Confusion]:
        """Return the answers by reference of each model that was asked with images, where there is a table."""
        tables = {}
        for name in self.with_images:
            answers = self.answers[name]
            references = [self.questions[index].answer for index in answers.indices]
            if (table := confusion(references, list(answers.texts))) is not None:
                tables[name] = table
        return tables

    def share_holding(self, name: str) -> float:
        """Return the fraction of a model's answers that contain a reference."""
        answers = self.answers[name]
        pairs = zip(answers.indices, answers.texts, strict=True)
        held = [
            any(holds_answer(text, reference) for reference in self.questions[index].references)
            for index, text in pairs
        ]
        return sum(held) / len(held) if held else 0.0


def score_all(metric: Metric, questions: Sequence[Question], texts: Sequence[str]) -> list[float]:
    """Score one answer to each question."""
    return [score_answer(metric, text, question.references) for question, text in zip(questions, texts, strict=True)]


def summarize(outcome: Outcome, by: Sequence[str] = ()) -> dict[str, Any]:
    """Return the content of `accuracy.json`: accuracies between 0 and 1, gains in percentage points."""
    images = {question.image for question in outcome.questions} - {None}
    result: dict[str, Any] = {"questions": len(outcome.questions), "images": len(images), "metric": outcome.metric}
    for name, table in outcome.tables().items():
        result[name] = _by_type(table)
    if BASE in outcome.answers:
        result["points_gained"] = outcome.over(BASE).in_points()["points"]
        result["base_holds_reference"] = round(outcome.share_holding(BASE), 5)
        if len(outcome.answers[BASE].indices) < len(outcome.questions):
            result[_TUNED_ON_BASE] = _by_type(outcome.table(TUNED, on=BASE))
    if BLIND in outcome.answers:
        result[BLIND] = _by_type(outcome.table(BLIND))
        result[TUNED_ON_BLIND] = _by_type(outcome.table(TUNED, on=BLIND))
        result["points_gained_over_blind"] = outcome.over(BLIND).in_points()["points"]
    result["comparisons"] = {f"tuned_over_{name}": _gap(outcome.over(name)) for name in outcome.compared}
    result["cut"] = {name: len(answers.cut) for name, answers in outcome.answers.items()}
    if by:
        result["by"] = {key: _by_value(outcome, value_of(key)) for key in by}
    if outcome.has_sources:
        result["by_source"] = _by_value(outcome, source_of)
    matrices = outcome.confusions()
    if TUNED in matrices:
        result["confusion"] = {name: matrix.as_json() for name, matrix in matrices.items()}
    return result


def accuracies_by(outcome: Outcome, of: _ValueOf) -> dict[str, dict[str, Accuracy]]:
    """Return the accuracies of each model by a value of each question, such as that of a key of the data."""
    tables = {}
    for name in outcome.with_images:
        answers = outcome.answers[name]
        values = [of(outcome.questions[index]) for index in answers.indices]
        tables[name] = accuracy_by_value(answers.scores, values)
    return tables


def value_of(key: str) -> _ValueOf:
    """Return a function from a question to the value of a key of its record."""
    return lambda question: question.value(key)


def source_of(question: Question) -> str:
    """Return the name of the source of a question, of several."""
    return question.record.source


def _by_value(outcome: Outcome, of: _ValueOf) -> dict[str, dict[str, Any]]:
    tables = accuracies_by(outcome, of)
    return {
        value: {name: _figures(table[value]) for name, table in tables.items() if value in table}
        for value in tables[TUNED]
    }


def _gap(gap: Difference) -> dict[str, Any]:
    return {**gap.in_points(), "questions": gap.questions, "clear": gap.is_clear}


def _by_type(table: Mapping[str, Accuracy]) -> dict[str, Any]:
    return {
        **_figures(table[ALL]),
        "by_type": {name: _figures(accuracy) for name, accuracy in table.items() if name != ALL},
    }


def _figures(accuracy: Accuracy) -> dict[str, Any]:
    return {
        "accuracy": round(accuracy.share, 5),
        "low": round(accuracy.low, 5),
        "high": round(accuracy.high, 5),
        "correct": accuracy.correct if isinstance(accuracy.correct, int) else round(accuracy.correct, 3),
        "questions": accuracy.total,
    }


def prediction_rows(outcome: Outcome) -> Iterator[dict[str, Any]]:
    """Yield the lines of `predictions.jsonl`: question, references, other keys of the record, each model's answer."""
    known = {name: answers.by_index() for name, answers in outcome.answers.items()}
    shared = shared_labels(outcome.questions)
    for index, question in enumerate(outcome.questions):
        row = question.described("answer", shared, (BASE, START, TUNED, BLIND))
        for name, answers in known.items():
            if index in answers:
                row[name] = _prediction(outcome, name, index, *answers[index])
        yield row


def _prediction(outcome: Outcome, name: str, index: int, text: str, score: float) -> dict[str, Any]:
    fields: dict[str, Any] = {"prediction": text, "correct": score == 1}
    if outcome.metric != "exact_match":
        fields["score"] = round(score, 4)
    if index in outcome.answers[name].cut:
        fields["cut"] = True
    return fields
