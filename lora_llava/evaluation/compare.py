"""Compare the tuned model with its base, with the start of its training, and with itself without the images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_llava.data.images.read import open_image
from lora_llava.data.questions import Question, QuestionSet
from lora_llava.evaluation.figures import SheetItem, ShownAnswer, contact_sheet
from lora_llava.evaluation.notes import outcome_notes, question_notes
from lora_llava.evaluation.outcome import (
    BASE,
    BLIND,
    START,
    TUNED,
    Answers,
    Outcome,
    accuracies_by,
    prediction_rows,
    score_all,
    source_of,
    summarize,
    value_of,
)
from lora_llava.evaluation.report import accuracy_table, confusion_table, max_labels, value_table
from lora_llava.evaluation.sample import blind_subset, spread_subset, varied_samples
from lora_llava.evaluation.scoring.confusion import Confusion
from lora_llava.evaluation.scoring.metrics import METRIC_NAMES, pick_metric
from lora_llava.generation.answers import PromptFormat, generate_answers
from lora_llava.generation.decoding import most_rows
from lora_llava.generation.output import write_table
from lora_llava.modeling.base import LoadedModel
from lora_llava.modeling.folded import folded
from lora_llava.recipe.choices import Metric
from lora_llava.recipe.settings import EvaluationSettings
from lora_llava.system.files import json_text, staged_file, write_text
from lora_llava.system.progress import Bar
from lora_llava.system.ranks import gathered, is_first, own_share
from lora_llava.system.text import counted

ACCURACY = "accuracy.json"
_PREDICTIONS = "predictions.jsonl"
SAMPLES = "samples.png"
_NUM_SAMPLES = 12
"""Images on the contact sheet."""


@dataclass(frozen=True, slots=True)
class Models:
    """The models to compare: adapters on one loaded base."""

    loaded: LoadedModel
    tuned: PromptFormat
    start: PromptFormat | None = None
    """If given, `loaded.model` has an adapter named `START`, from which training started."""
    base: bool = True
    """Whether to ask the base: the model with its adapter disabled and its own projector."""
    hub: dict[str, Any] | None = None
    """`repo_id` and `revision` of the tuned model, if it came from the Hub."""

    @contextmanager
    def as_model(self, name: str) -> Iterator[None]:
        """Switch adapters inside the `with` block, so that the loaded model answers as this one.

        Ask the base first: merging an adapter into its weights and out again rounds them.
        """
        if name == BASE:
            with self.loaded.model.disable_adapter():
                yield
        elif name == START:
            active = self.loaded.model.active_adapter
            self.loaded.model.set_adapter(START)
            try:
                with folded(self.loaded.model):
                    yield
            finally:
                self.loaded.model.set_adapter(active)
        else:
            with folded(self.loaded.model):
                yield


def compare(
    models: Models, asked: QuestionSet, settings: EvaluationSettings, directory: Path, console: Console
) -> dict[str, Any]:
    """Ask every model the questions; score the answers, write and print the results.

    The tuned model and its start are asked all questions, the base `settings.base_questions` of them. Blind replaces
    the images by their mean color, for the first images that hold `settings.blind_questions`. Writes
    `predictions.jsonl`, `accuracy.json` and `samples.png` to `directory`; returns the content of `accuracy.json`. The
    processes of a run share the questions; the first writes, and the others return {}.
    """
    questions = asked.questions
    references = [question.answer for question in questions]
    metric = pick_metric(settings.metric, references)
    warnings = question_notes(questions, metric, settings.max_new_tokens, _token_counter(models.loaded))
    # Print these before generating: they may call for another setting.
    for warning in warnings:
        console.print(f"evaluation: {warning}", style="yellow", markup=False, highlight=False)
    everything = range(len(questions))
    subsets: dict[str, Sequence[int]] = {}
    if models.base:
        subsets[BASE] = spread_subset(questions, settings.base_questions)
    if models.start is not None:
        subsets[START] = everything
    subsets[TUNED] = everything
    if settings.blind_questions and (blind := blind_subset(questions, settings.blind_questions)):
        subsets[BLIND] = blind
    answers = {
        name: _ask(models, name, questions, indices, metric, settings, console) for name, indices in subsets.items()
    }
    if not is_first():
        return {}
    directory.mkdir(parents=True, exist_ok=True)
    outcome = Outcome(questions, metric, answers)
    notes = [*asked.passed_over(), *outcome_notes(outcome, settings.max_new_tokens)]
    result = {**summarize(outcome, settings.broken_down_by), **_asked(asked, settings), "notes": [*warnings, *notes]}
    if models.hub is not None:
        result["hub"] = models.hub
    write_table(directory / _PREDICTIONS, prediction_rows(outcome))
    write_text(directory / ACCURACY, json_text(result, indent=2, ensure_ascii=False) + "\n")
    _write_samples(directory / SAMPLES, outcome)
    _show(outcome, settings.broken_down_by, console)
    console.print()
    for note in notes:
        console.print(note, markup=False, highlight=False)
    return result


def _asked(asked: QuestionSet, settings: EvaluationSettings) -> dict[str, Any]:
    """Return how much of the data was asked, and with which limit."""
    passed_over = {"records_without_an_answer": asked.unanswered, "last_questions_without_an_answer": asked.open_ended}
    return {"records": asked.num_records, "passed_over": passed_over, "max_new_tokens": settings.max_new_tokens}


def _token_counter(loaded: LoadedModel) -> Callable[[Sequence[str]], list[int]]:
    """Return a function that counts the tokens of texts, without special tokens."""

    def num_tokens(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in loaded.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    return num_tokens


def _ask(
    models: Models,
    name: str,
    questions: Sequence[Question],
    indices: Sequence[int],
    metric: Metric,
    settings: EvaluationSettings,
    console: Console,
) -> Answers:
    """Generate and score the answers of one model to the questions at `indices`, with a progress bar."""
    subset = [questions[index] for index in indices]
    # Neighbors are about one image, which is computed once for them.
    share = [indices[number] for number in own_share(len(indices))]
    parts = gathered(_generate(models, name, [questions[index] for index in share], settings, console))
    texts = [text for part, _ in parts for text in part]
    are_cut = [is_cut for _, part in parts for is_cut in part]
    cut = frozenset(index for index, is_cut in zip(indices, are_cut, strict=True) if is_cut)
    return Answers(indices, texts, score_all(metric, subset, texts), cut)


def _generate(
    models: Models, name: str, questions: Sequence[Question], settings: EvaluationSettings, console: Console
) -> tuple[list[str], list[bool]]:
    """Return the answers of one model, and whether `max_new_tokens` cut each short."""
    if not questions:
        return [], []
    # The base is asked like the tuned model.
    form = models.start if name == START and models.start is not None else models.tuned
    cut: set[int] = set()
    with models.as_model(name), Bar(f"answers, {name}", len(questions), console) as bar:
        texts = generate_answers(
            models.loaded,
            [question.record for question in questions],
            replace(form, blind=name == BLIND),
            max_new_tokens=settings.max_new_tokens,
            max_rows=most_rows(models.loaded.model) if settings.batch_size == "auto" else settings.batch_size,
            progress=lambda done, _: bar.update(done),
            on_cut=cut.add,
        )
    return texts, [number in cut for number in range(len(texts))]


def _write_samples(path: Path, outcome: Outcome) -> None:
    """Draw the contact sheet, unless there are no images."""
    among = outcome.answers[BASE].indices if BASE in outcome.answers else None
    known = {name: outcome.answers[name].by_index() for name in outcome.with_images}
    items = []
    for index in varied_samples(outcome.questions, _NUM_SAMPLES, among):
        question = outcome.questions[index]
        assert question.record.image is not None
        answers = [
            ShownAnswer(name, *answers[index], is_cut=index in outcome.answers[name].cut)
            for name, answers in known.items()
        ]
        items.append(SheetItem(open_image(question.record.image), question.record.question, question.answer, answers))
    if items:
        title = f"{len(items)} of {counted(len(outcome.questions), 'test question')}, answered by {' and '.join(known)}"
        with staged_file(path) as temporary:
            contact_sheet(temporary, items, title, METRIC_NAMES[outcome.metric])


def _show(outcome: Outcome, by: Sequence[str], console: Console) -> None:
    """Print the tables of accuracies, and of answers by reference."""
    console.print()
    width = console.width
    console.print(accuracy_table(outcome.tables(), outcome.metric, width))
    images = {question.image for question in outcome.questions} - {None}
    console.print(f"{counted(len(outcome.questions), 'question')} on {counted(len(images), 'image')}")
    console.print("majority: always giving the most frequent answer of each type of question")
    if BASE in outcome.answers and len(asked := outcome.answers[BASE].indices) < len(outcome.questions):
        console.print(f"base: asked {counted(len(asked), 'question')}, on images spread over the set")
    if BLIND in outcome.answers:
        console.print("\nThe same questions without their images (the mean color in place of each):")
        blind = {TUNED: outcome.table(TUNED, on=BLIND), BLIND: outcome.table(BLIND)}
        console.print(accuracy_table(blind, outcome.metric, width))
    if outcome.has_sources:
        console.print()
        console.print(value_table(accuracies_by(outcome, source_of), "source", outcome.metric, width))
    for key in by:
        console.print()
        console.print(value_table(accuracies_by(outcome, value_of(key)), key, outcome.metric, width))
    matrices = outcome.confusions()
    if counts := matrices.get(TUNED):
        console.print()
        if len(counts.labels) <= max_labels(width):
            console.print(confusion_table(counts, TUNED, width))
        else:
            console.print(f"{ACCURACY} has the answers by reference, too many for {width} columns.")
        if yes := counts.yes:
            figures = [f"{name} {'-' if value is None else f'{100 * value:.1f} %'}" for name, value in yes.items()]
            console.print(f"yes: {', '.join(figures).replace('f1', 'F1')}")
        _show_yes_bias(matrices, console)


def _show_yes_bias(matrices: Mapping[str, Confusion], console: Console) -> None:
    """Print how much more often than it is right each model answers yes."""
    shown = []
    for name, matrix in matrices.items():
        if (bias := matrix.yes_bias) is not None:
            interval = f"{100 * bias.low:+.1f} to {100 * bias.high:+.1f}"
            shown.append(f"{name} {100 * bias.mean:+.1f} points ({interval})")
    if shown:
        console.print(f"yes more often than in the references: {', '.join(shown)}")
