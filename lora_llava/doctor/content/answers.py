"""How far answers can be given without a look at the image: skewed sets, and questions that tell their answers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from lora_llava.conversation.encode import IMAGE_PLACEHOLDER
from lora_llava.doctor.compare import SHORT_ANSWER, Finding, finding_about, normalized
from lora_llava.doctor.survey import Side, Survey
from lora_llava.system.text import counted, printable

_MIN_QUESTIONS = 20
_MAX_SHARE = 0.6
"""Report a side from this share of right answers without a look on: a coin gets half of yes and no."""


def answer_findings(survey: Survey) -> Iterator[Finding]:
    """Yield sides in which one answer is most of all, and tested sides whose questions tell the answers."""
    trained = [side for side in survey.sides if side.role == "training"]
    for side in survey.sides:
        yield from _majority(side)
        if side.role != "training":
            known = [other for other in trained if side.role == "evaluation" or other.stage == side.stage]
            yield from _by_question(side, known)


def _majority(side: Side) -> Iterator[Finding]:
    """Compare with always giving the most frequent answer."""
    pairs = _pairs(side)
    if len(pairs) < _MIN_QUESTIONS:
        return
    [(answer, count)] = Counter(answer for _, answer in pairs).most_common(1)
    if count >= _MAX_SHARE * len(pairs) and len(answer.split()) <= SHORT_ANSWER:
        share = f"{printable(answer, 60)!r} is {count / len(pairs):.0%} of {counted(len(pairs), 'answer')}"
        yield finding_about(
            "skewed_answers", side.source, f"{side.name}: {share}; always answering it is right as often"
        )


def _by_question(side: Side, trained: list[Side]) -> Iterator[Finding]:
    """Compare with answering each question as training answers it most often, whatever the image."""
    pairs = _pairs(side)
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for other in trained:
        for question, answer in _pairs(other):
            answers[question][answer] += 1
    guesses = {question: counts.most_common(1)[0][0] for question, counts in answers.items()}
    right = sum(guesses.get(question) == answer for question, answer in pairs)
    if len(pairs) >= _MIN_QUESTIONS and right >= _MAX_SHARE * len(pairs):
        share = f"{right / len(pairs):.0%} of {counted(len(pairs), 'question')} are answered right"
        problem = f"{side.name}: {share} by the most frequent answer to the same question in training"
        yield finding_about("skewed_answers", side.source, problem)


def _pairs(side: Side) -> list[tuple[str, str]]:
    """Return all questions of a side with their answers, both normalized."""
    return [
        (normalized(asked.text.replace(IMAGE_PLACEHOLDER, "")), normalized(answered.text))
        for record in side.records
        for asked, answered in zip(record.turns[::2], record.turns[1::2], strict=False)
    ]
