"""The tuned model beside its base, and beside itself with the images taken away, on the same questions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from lora_llava.chat_template import OwnTemplate
from lora_llava.conversation import Template
from lora_llava.data.images import open_image
from lora_llava.data.records import Record
from lora_llava.errors import DataError
from lora_llava.evaluation.decoding import Progress
from lora_llava.evaluation.exact import answer_tokens, exact_match
from lora_llava.evaluation.figures import SheetItem, contact_sheet
from lora_llava.evaluation.generation import generate_answers
from lora_llava.evaluation.metrics import ALL, Accuracy, accuracy_by_type
from lora_llava.evaluation.report import accuracy_table, prediction_row, write_predictions
from lora_llava.modeling.base import LoadedModel
from lora_llava.recipe_stages import AspectRatio

ACCURACY = "accuracy.json"
PREDICTIONS = "predictions.jsonl"
SAMPLES = "samples.png"
NUM_SAMPLES = 12
"""Images on the contact sheet."""

BASE, TUNED, BLIND = "base", "tuned", "blind"
TUNED_ON_BLIND = "tuned_on_blind_questions"


@dataclass(frozen=True, slots=True)
class Asking:
    """How questions are put to the models; the same for all of them."""

    template: Template | OwnTemplate
    aspect_ratio: AspectRatio
    max_new_tokens: int
    max_rows: int


def compare(
    loaded: LoadedModel,
    records: Sequence[Record],
    *,
    template: Template | OwnTemplate,
    aspect_ratio: AspectRatio,
    max_new_tokens: int,
    blind_questions: int | None,
    directory: Path,
    console: Console,
    base: bool = True,
    max_rows: int = 64,
) -> dict[str, Any]:
    """Answer `records` with the tuned model, with its base, and blind; score, write and show the results.

    The base is the same loaded `PeftModel` without its adapter and with its own projector. Blind puts the mean
    colour in place of the images, on the first images that hold `blind_questions` questions (None: not at all).
    Writes `predictions.jsonl`, `accuracy.json` and `samples.png` into `directory`, and returns what is in
    `accuracy.json`. Raises DataError if there is no question with an answer.
    """
    records = [record for record in records if record.turns[-1].role == "assistant"]
    if not records:
        raise DataError("evaluation: there is no question with an answer to compare with")
    directory.mkdir(parents=True, exist_ok=True)
    asking = Asking(template, aspect_ratio, max_new_tokens, max_rows)
    answers: dict[str, list[str]] = {}
    if base:
        with loaded.model.disable_adapter():
            answers[BASE] = _ask(loaded, records, asking, BASE, console)
    answers[TUNED] = _ask(loaded, records, asking, TUNED, console)
    blind = blind_subset(records, blind_questions) if blind_questions else []
    blind_answers = _ask(loaded, [records[place] for place in blind], asking, BLIND, console) if blind else []
    truth = [record.turns[-1].text for record in records]
    scores = {name: _accuracies(predictions, truth) for name, predictions in answers.items()}
    subset = {
        TUNED: _accuracies([answers[TUNED][place] for place in blind], [truth[place] for place in blind]),
        BLIND: _accuracies(blind_answers, [truth[place] for place in blind]),
    }
    result = summarize(scores, subset if blind else {}, num_images(records))
    write_predictions(directory / PREDICTIONS, _rows(records, answers, dict(zip(blind, blind_answers, strict=True))))
    (directory / ACCURACY).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _write_samples(directory / SAMPLES, records, answers)
    _show(scores, subset if blind else {}, result, console)
    return result


def _accuracies(predictions: Sequence[str], answers: Sequence[str]) -> dict[str, Accuracy]:
    return accuracy_by_type([exact_match(*pair) for pair in zip(predictions, answers, strict=True)], answers)


def _ask(loaded: LoadedModel, records: Sequence[Record], asking: Asking, name: str, console: Console) -> list[str]:
    """Let one model answer, with progress shown."""
    with shown_progress(f"answers, {name}", len(records), console) as progress:
        return generate_answers(
            loaded,
            records,
            template=asking.template,
            aspect_ratio=asking.aspect_ratio,
            max_new_tokens=asking.max_new_tokens,
            max_rows=asking.max_rows,
            blind=name == BLIND,
            progress=progress,
        )


def blind_subset(records: Sequence[Record], num_questions: int) -> list[int]:
    """Return the places of the questions on the first images that together hold at least `num_questions`.

    Whole images: the share that is right blind depends on which questions an image is asked.
    """
    by_image: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        if record.image is not None:
            by_image.setdefault(record.image.key, []).append(place)
    chosen: list[int] = []
    for places in by_image.values():
        if len(chosen) >= num_questions:
            break
        chosen += places
    return sorted(chosen)


def num_images(records: Sequence[Record]) -> int:
    """Count the different images."""
    return len({record.image.key for record in records if record.image is not None})


def summarize(
    scores: Mapping[str, Mapping[str, Accuracy]], subset: Mapping[str, Mapping[str, Accuracy]], images: int
) -> dict[str, Any]:
    """Put scores into the form of `accuracy.json`; accuracies and intervals are between 0 and 1."""
    result: dict[str, Any] = {"questions": scores[TUNED][ALL].total, "images": images}
    result.update({name: _by_type(table) for name, table in scores.items()})
    if BASE in scores:
        gained = 100 * (scores[TUNED][ALL].share - scores[BASE][ALL].share)
        result["points_gained"] = round(gained, 2)
    if subset:
        result[BLIND] = _by_type(subset[BLIND])
        result[TUNED_ON_BLIND] = _by_type(subset[TUNED])
        gained = 100 * (subset[TUNED][ALL].share - subset[BLIND][ALL].share)
        result["points_gained_over_blind"] = round(gained, 2)
    return result


def _by_type(table: Mapping[str, Accuracy]) -> dict[str, Any]:
    return {
        **_figures(table[ALL]),
        "by_type": {name: _figures(one) for name, one in table.items() if name != ALL},
    }


def _figures(accuracy: Accuracy) -> dict[str, Any]:
    return {
        "accuracy": round(accuracy.share, 5),
        "low": round(accuracy.low, 5),
        "high": round(accuracy.high, 5),
        "correct": accuracy.correct,
        "questions": accuracy.total,
    }


def _rows(
    records: Sequence[Record], answers: Mapping[str, Sequence[str]], blind: Mapping[int, str]
) -> Iterator[dict[str, Any]]:
    for place, record in enumerate(records):
        predictions = {name: given[place] for name, given in answers.items()}
        if place in blind:
            predictions[BLIND] = blind[place]
        # The file's name alone: where the images lie is a matter of this machine.
        image = record.image.path.name if record.image and record.image.path else None
        yield prediction_row(record.id, image, record.question, record.turns[-1].text, predictions)


def varied_samples(records: Sequence[Record], count: int) -> list[int]:
    """Return the places of up to `count` questions: images spread over the set, answers as varied as may be."""
    by_image: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        if record.image is not None:
            by_image.setdefault(record.image.key, []).append(place)
    groups = list(by_image.values())
    count = min(count, len(groups))
    shown: Counter[tuple[str, ...]] = Counter()
    chosen = []
    for number in range(count):
        places = groups[number * len(groups) // count]
        best = min(places, key=lambda place: shown[answer_tokens(records[place].turns[-1].text)])
        shown[answer_tokens(records[best].turns[-1].text)] += 1
        chosen.append(best)
    return chosen


def _write_samples(path: Path, records: Sequence[Record], answers: Mapping[str, Sequence[str]]) -> None:
    """Draw the contact sheet; without images there is none."""
    items = []
    for place in varied_samples(records, NUM_SAMPLES):
        record = records[place]
        assert record.image is not None
        items.append(
            SheetItem(
                image=open_image(record.image),
                question=record.question,
                answer=record.turns[-1].text,
                base=answers[BASE][place] if BASE in answers else None,
                tuned=answers[TUNED][place],
            )
        )
    if items:
        contact_sheet(path, items)


def _show(
    scores: Mapping[str, Mapping[str, Accuracy]],
    subset: Mapping[str, Mapping[str, Accuracy]],
    result: Mapping[str, Any],
    console: Console,
) -> None:
    """Print the tables: all questions, then those that were asked blind too."""
    console.print(accuracy_table(scores))
    if "points_gained" in result:
        console.print(f"tuned over base: {result['points_gained']:+.1f} points, {result['images']:,} images")
    if subset:
        console.print("The same questions without their images (the mean colour in place of each):")
        console.print(accuracy_table({TUNED: subset[TUNED], BLIND: subset[BLIND]}))
        console.print(f"tuned over blind: {result['points_gained_over_blind']:+.1f} points")


@contextmanager
def shown_progress(label: str, total: int, console: Console) -> Iterator[Progress]:
    """Give a function to call with (done, all): a bar on a terminal, a plain line each tenth elsewhere."""
    if console.is_terminal:
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=console) as bar:
            task = bar.add_task(label, total=total)
            yield lambda done, all_: bar.update(task, completed=done, total=all_)
        return
    last = 0

    def line(done: int, all_: int) -> None:
        nonlocal last
        if (tenth := 10 * done // max(all_, 1)) > last:
            last = tenth
            console.print(f"{label}: {done:,}/{all_:,}")

    yield line
