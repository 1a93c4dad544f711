"""Sentences about an evaluation: questions without a possible right answer, and what the differences show.

Gains and losses are worded alike, each with its interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median

from lora_llava.data.questions import Question
from lora_llava.evaluation.outcome import BASE, BLIND, START, Outcome
from lora_llava.evaluation.report import MAJORITY
from lora_llava.evaluation.scoring.exact_match import answer_tokens
from lora_llava.evaluation.scoring.metrics import ALL, METRIC_NAMES, Difference, is_void
from lora_llava.recipe.choices import Metric
from lora_llava.system.text import counted, listed, printable

_SENTENCE = 4
"""Words. A base gives long answers if its median answer has at least these, and twice those of the references."""
_NAMES = {BASE: "the base", START: "the start", MAJORITY: "the most frequent answer", BLIND: "no images"}


def question_notes(
    questions: Sequence[Question], metric: Metric, max_new_tokens: int, num_tokens: Callable[[Sequence[str]], list[int]]
) -> list[str]:
    """Return notes on references that no answer can match; `num_tokens` counts the tokens of texts."""
    notes = []
    lengths = num_tokens([question.answer for question in questions])
    long = [length for length in lengths if length > max_new_tokens]
    if long:
        what = "can equal them" if metric != "token_f1" else "can hold all of them"
        notes.append(
            f"{len(long):,} of {counted(len(lengths), 'reference')} {'is' if len(long) == 1 else 'are'} longer than "
            f"max_new_tokens {max_new_tokens}, so no answer {what}: raise it to {max(long)} or more"
        )
    void = [question.answer for question in questions if is_void(metric, question.answer)]
    if void:
        shown = listed([repr(printable(text)) for text in dict.fromkeys(void)], 3)
        notes.append(
            f"{counted(len(void), 'reference')} ({shown}) {'normalizes' if len(void) == 1 else 'normalize'} to nothing "
            f"under {METRIC_NAMES[metric]}: the score says nothing about {'it' if len(void) == 1 else 'them'}"
        )
    return notes


def outcome_notes(outcome: Outcome, max_new_tokens: int) -> Iterator[str]:
    """Yield what the answers show: each comparison with its interval and its qualification."""
    for name in (START, BASE, MAJORITY, BLIND):
        if name in outcome.compared:
            yield _comparison(outcome, name)
    if BASE in outcome.answers and (note := _base_form(outcome)):
        yield note
    cut = [(name, answers) for name, answers in outcome.answers.items() if answers.cut]
    if cut:
        counts = ", ".join(f"{len(answers.cut):,} of {len(answers.indices):,} of {name}" for name, answers in cut)
        yield f"Answers cut at max_new_tokens {max_new_tokens}: {counts}."


def _comparison(outcome: Outcome, name: str) -> str:
    gap = outcome.over(name)
    same = "the same " if gap.questions < len(outcome.questions) else ""
    text = (
        f"tuned against {_NAMES[name]}: {100 * gap.mean:+.1f} points (95 % interval {100 * gap.low:+.1f} to "
        f"{100 * gap.high:+.1f}) on {same}{counted(gap.questions, 'question')}"
    )
    return f"{text}{_verdict(name, gap)}."


def _verdict(name: str, gap: Difference) -> str:
    """Return what a difference fails to show, or shows against the tuned model; empty for a clear gain."""
    if gap.is_clear and gap.mean > 0:
        return ""
    unclear = ": too few questions, or too small a difference, to tell"
    if name == MAJORITY:
        return f"{unclear} whether it beats that" if gap.mean > 0 else ": it does not beat always giving that"
    if name == BLIND:
        if gap.is_clear:
            return ": it answers better without the images"
        return f"{unclear} whether it looks at the images" if gap.mean > 0 else ": it may not look at the images"
    return ": it got worse" if gap.is_clear else f"{unclear} them apart"


def _base_form(outcome: Outcome) -> str:
    """Qualify a gain over a base whose long answers contain more references than its score counts."""
    answers = outcome.answers[BASE]
    given = median(len(answer_tokens(text)) for text in answers.texts)
    expected = median(len(answer_tokens(outcome.questions[index].answer)) for index in answers.indices)
    if given < _SENTENCE or given < 2 * expected:
        return ""
    score, holding = outcome.table(BASE)[ALL].share, outcome.share_holding(BASE)
    if outcome.over(BASE).mean <= 0 or holding <= score:
        return ""
    return (
        f"The base gives long answers: {100 * holding:.0f} % of them contain the "
        f"reference, where its score is {100 * score:.1f} %, so part of the gain over it is the form of the answers."
    )
