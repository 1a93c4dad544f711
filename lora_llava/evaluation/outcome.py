"""What an evaluation found: the answers of each model with their scores, and the figures of `accuracy.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lora_llava.evaluation.questions import Question
from lora_llava.evaluation.report import MAJORITY
from lora_llava.evaluation.scoring.confusion import confusion
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
TUNED_ON_BASE = "tuned_on_base_questions"


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers of one model, to all questions or to some."""

    places: Sequence[int]
    """Which questions, ascending."""
    texts: Sequence[str]
    scores: Sequence[float]
    cut: frozenset[int] = frozenset()
    """Places of the answers that reached `max_new_tokens` before their end."""

    def by_place(self) -> dict[int, tuple[str, float]]:
        """Map the place of a question to the answer and its score."""
        return dict(zip(self.places, zip(self.texts, self.scores, strict=True), strict=True))


@dataclass(frozen=True)
class Outcome:
    """All answers of an evaluation."""

    questions: Sequence[Question]
    metric: Metric
    answers: Mapping[str, Answers]
    """By the name of the model; `TUNED` was asked everything."""

    @cached_property
    def majority(self) -> Answers:
        """What always giving the most frequent answer of the type would score."""
        texts = majority_answers([question.answer for question in self.questions])
        return Answers(range(len(texts)), texts, score_all(self.metric, self.questions, texts))

    def table(self, name: str, on: str | None = None) -> dict[str, Accuracy]:
        """Return the accuracies of a model by type of question; `on`: on those that this model was asked."""
        answers = self.majority if name == MAJORITY else self.answers[name]
        known = answers.by_place()
        places = answers.places if on is None else self.answers[on].places
        scores = [known[place][1] for place in places]
        return accuracy_by_type(scores, [self.questions[place].answer for place in places])

    def tables(self) -> dict[str, dict[str, Accuracy]]:
        """Return the accuracies of the majority answer, the base, the start and the tuned model, as far as asked."""
        names = [name for name in (BASE, START, TUNED) if name in self.answers]
        return {MAJORITY: self.table(MAJORITY), **{name: self.table(name) for name in names}}

    def over(self, other: str) -> Difference:
        """Return how much more the tuned model scores than another, on the questions that both were asked."""
        first = self.answers[TUNED].by_place()
        second = (self.majority if other == MAJORITY else self.answers[other]).by_place()
        places = [place for place in second if place in first]
        return difference([first[place][1] for place in places], [second[place][1] for place in places])

    @property
    def compared(self) -> list[str]:
        """What the tuned model is compared with."""
        return [name for name in (BASE, START, MAJORITY, BLIND) if name == MAJORITY or name in self.answers]

    def share_holding(self, name: str) -> float:
        """Return the share of a model's answers that hold a reference as a word."""
        answers = self.answers[name]
        pairs = zip(answers.places, answers.texts, strict=True)
        held = [any(holds_answer(text, one) for one in self.questions[place].references) for place, text in pairs]
        return sum(held) / len(held) if held else 0.0


def score_all(metric: Metric, questions: Sequence[Question], texts: Sequence[str]) -> list[float]:
    """Score an answer to each question."""
    return [score_answer(metric, text, question.references) for question, text in zip(questions, texts, strict=True)]


def summarize(outcome: Outcome, by: Sequence[str] = ()) -> dict[str, Any]:
    """Put an outcome into the form of `accuracy.json`; accuracies are between 0 and 1, gains in points."""
    images = {question.image for question in outcome.questions} - {None}
    result: dict[str, Any] = {"questions": len(outcome.questions), "images": len(images), "metric": outcome.metric}
    for name, table in outcome.tables().items():
        result[name] = _by_type(table)
    if BASE in outcome.answers:
        result["points_gained"] = _points(outcome.over(BASE).mean)
        result["base_holds_reference"] = round(outcome.share_holding(BASE), 5)
        if len(outcome.answers[BASE].places) < len(outcome.questions):
            result[TUNED_ON_BASE] = _by_type(outcome.table(TUNED, on=BASE))
    if BLIND in outcome.answers:
        result[BLIND] = _by_type(outcome.table(BLIND))
        result[TUNED_ON_BLIND] = _by_type(outcome.table(TUNED, on=BLIND))
        result["points_gained_over_blind"] = _points(outcome.over(BLIND).mean)
    result["comparisons"] = {f"tuned_over_{name}": _gap(outcome.over(name)) for name in outcome.compared}
    result["cut"] = {name: len(answers.cut) for name, answers in outcome.answers.items()}
    if by:
        result["by"] = {key: _by_value(outcome, key) for key in by}
    matrices = {name: confusion(*_pairs(outcome, name)) for name in (BASE, START, TUNED) if name in outcome.answers}
    if matrices[TUNED]:
        result["confusion"] = {name: matrix.as_json() for name, matrix in matrices.items() if matrix}
    return result


def _pairs(outcome: Outcome, name: str) -> tuple[list[str], list[str]]:
    """Return the references, and the answers, of the questions that a model was asked."""
    answers = outcome.answers[name]
    return [outcome.questions[place].answer for place in answers.places], list(answers.texts)


def accuracies_by(outcome: Outcome, key: str) -> dict[str, dict[str, Accuracy]]:
    """Return, for each model, the accuracies by the values of an own key."""
    tables = {}
    for name in (BASE, START, TUNED):
        if name in outcome.answers:
            answers = outcome.answers[name]
            values = [outcome.questions[place].value(key) for place in answers.places]
            tables[name] = accuracy_by_value(answers.scores, values)
    return tables


def _by_value(outcome: Outcome, key: str) -> dict[str, dict[str, Any]]:
    tables = accuracies_by(outcome, key)
    return {
        value: {name: _figures(table[value]) for name, table in tables.items() if value in table}
        for value in tables[TUNED]
    }


def _points(share: float) -> float:
    return round(100 * share, 2)


def _gap(gap: Difference) -> dict[str, Any]:
    points = {"points": _points(gap.mean), "low": _points(gap.low), "high": _points(gap.high)}
    return {**points, "questions": gap.questions, "clear": gap.is_clear}


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
    """Yield the lines of `predictions.jsonl`: question, references, the data's own keys, and each model's answer."""
    known = {name: answers.by_place() for name, answers in outcome.answers.items()}
    for place, question in enumerate(outcome.questions):
        row: dict[str, Any] = {
            "id": question.record.id,
            "image": question.record.image.label if question.record.image else None,
            "question": question.record.question,
            "answer": question.answer,
        }
        if question.of > 1:
            row["turn"] = question.number
        if len(question.references) > 1:
            row["references"] = list(question.references)
        taken = {*row, "turn", "references", BASE, START, TUNED, BLIND}
        row |= {f"data_{key}" if key in taken else key: value for key, value in question.own.items()}
        for name, answers in known.items():
            if place in answers:
                row[name] = _prediction(outcome, name, place, *answers[place])
        yield row


def _prediction(outcome: Outcome, name: str, place: int, text: str, score: float) -> dict[str, Any]:
    fields: dict[str, Any] = {"prediction": text, "correct": score == 1}
    if outcome.metric != "exact_match":
        fields["score"] = round(score, 4)
    if place in outcome.answers[name].cut:
        fields["cut"] = True
    return fields
