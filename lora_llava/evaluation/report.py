"""Results to read: one line a question, a table of accuracies."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from lora_llava.evaluation.metrics import CLOSED, GROUPS, NUMBER, OTHER, YES_NO, Accuracy, exact_match

_LABELS = {CLOSED: "closed (yes/no)", NUMBER: "open: number", OTHER: "open: other"}


def prediction_row(
    record_id: str, image: str | None, question: str, answer: str, predictions: Mapping[str, str]
) -> dict[str, Any]:
    """Make a row of `write_predictions`; `predictions` has an answer for each model's name."""
    row: dict[str, Any] = {"id": record_id, "image": image, "question": question, "answer": answer}
    for name, prediction in predictions.items():
        if name in row:
            raise ValueError(f"a model cannot be called {name!r}: that is a field of every row")
        row[name] = {"prediction": prediction, "correct": exact_match(prediction, answer)}
    return row


def write_predictions(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, in UTF-8."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def accuracy_rows(results: Mapping[str, Mapping[str, Accuracy]]) -> list[list[str]]:
    """Lay accuracies out as text, a heading row first: group, questions, then a column for each model's name.

    `results` maps a model's name to what `accuracy_by_type` returned, for the same questions.
    """
    groups = [group for group in GROUPS if any(group in table for table in results.values())]
    if CLOSED in groups:
        # The same questions under their other name.
        groups = [group for group in groups if group != YES_NO]
    rows = [["answers", "questions", *results]]
    for group in groups:
        totals = {str(table[group].total) for table in results.values() if group in table}
        cells = [_cell(table.get(group)) for table in results.values()]
        rows.append([_LABELS.get(group, group), "/".join(sorted(totals)), *cells])
    return rows


def _cell(accuracy: Accuracy | None) -> str:
    if accuracy is None or accuracy.total == 0:
        return "-"
    return f"{100 * accuracy.share:.1f} ({100 * accuracy.low:.1f}-{100 * accuracy.high:.1f})"


def accuracy_table(results: Mapping[str, Mapping[str, Accuracy]]) -> Table:
    """Show accuracies in per cent with their 95 % Wilson intervals, for a terminal."""
    heading, *rows = accuracy_rows(results)
    table = Table(title="Accuracy in % (95 % interval)", title_justify="left")
    for place, name in enumerate(heading):
        table.add_column(Text(name), justify="left" if place == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row, end_section=row is rows[0], style="bold" if row is rows[0] else None)
    return table


def accuracy_markdown(results: Mapping[str, Mapping[str, Accuracy]]) -> str:
    """Show the same as a Markdown table whose columns also line up as plain text; ends with a line feed."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in accuracy_rows(results)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    aligned = [
        [cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(columns)]
        for columns in (list(zip(row, widths, strict=True)) for row in (rows[0], rule, *rows[1:]))
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in aligned)
