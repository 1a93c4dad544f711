"""Results to read: one line a question, tables of accuracies and of answers by reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_llava.evaluation.scoring.confusion import Confusion
from lora_llava.evaluation.scoring.metrics import (
    ALL,
    CLOSED,
    GROUPS,
    METRIC_NAMES,
    NUMBER,
    OTHER,
    YES_NO,
    Accuracy,
)
from lora_llava.recipe.choices import Metric
from lora_llava.system.files import json_text
from lora_llava.system.table import MUST, Column, FittingTable
from lora_llava.system.text import printable

MAJORITY = "majority"
"""Name of the column of always giving the most frequent answer."""
_LABELS = {CLOSED: "closed (yes/no)", NUMBER: "open: number", OTHER: "open: other"}
_WIDTH = 80
"""Columns of a terminal, unless told otherwise."""
_MAX_VALUES = 12
"""Values of an own key that a table lists."""
_MAX_LABEL = 20


def write_predictions(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, in UTF-8."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json_text(row, ensure_ascii=False) + "\n")


def accuracy_rows(results: Mapping[str, Mapping[str, Accuracy]]) -> list[list[str]]:
    """Lay accuracies out as text, a heading row first: group, questions, then a column for each model's name.

    `results` maps a model's name to what `accuracy_by_type` returned. A model that was asked fewer questions than the
    others has their number in its heading.
    """
    groups = [group for group in GROUPS if any(group in table for table in results.values())]
    if CLOSED in groups:
        # The same questions under their other name.
        groups = [group for group in groups if group != YES_NO]
    return _rows(results, ALL, groups, "answers", _LABELS)


def _rows(
    results: Mapping[str, Mapping[str, Accuracy]],
    whole: str,
    groups: Sequence[str],
    heading: str,
    labels: Mapping[str, str],
) -> list[list[str]]:
    most = {group: max(table[group].total for table in results.values() if group in table) for group in groups}
    asked = {
        name: table[whole].total if whole in table else sum(accuracy.total for accuracy in table.values())
        for name, table in results.items()
    }
    names = [name if count == max(asked.values()) else f"{name} ({count:,})" for name, count in asked.items()]
    rows = [[heading, "questions", *names]]
    for group in groups:
        cells = [_cell(table.get(group), bare=name == MAJORITY) for name, table in results.items()]
        rows.append([labels.get(group, group), str(most[group]), *cells])
    return rows


def value_rows(results: Mapping[str, Mapping[str, Accuracy]], key: str) -> list[list[str]]:
    """Lay the accuracies by the values of an own key out as `accuracy_rows` does, those with most questions first."""
    values = list(dict.fromkeys(value for table in reversed([*results.values()]) for value in table))
    shown = values[:_MAX_VALUES]
    labels = {value: _short(printable(value)) for value in shown}
    rows = _rows(results, "", values, _short(printable(key)), labels)
    rows = [rows[0], *rows[1 : 1 + _MAX_VALUES]]
    if len(values) > len(shown):
        rows.append([f"and {len(values) - len(shown):,} more", *[""] * (len(rows[0]) - 1)])
    return rows


def _short(text: str) -> str:
    return text if len(text) <= _MAX_LABEL else f"{text[: _MAX_LABEL - 1]}\N{HORIZONTAL ELLIPSIS}"


def _cell(accuracy: Accuracy | None, *, bare: bool) -> str:
    if accuracy is None or accuracy.total == 0:
        return "-"
    if bare:
        # Taken from these very questions: there is nothing to be sure of.
        return f"{100 * accuracy.share:.1f}"
    return f"{100 * accuracy.share:.1f} ({100 * accuracy.low:.1f}-{100 * accuracy.high:.1f})"


def accuracy_table(
    results: Mapping[str, Mapping[str, Accuracy]], metric: Metric = "exact_match", width: int = _WIDTH
) -> FittingTable:
    """Show accuracies in per cent with their 95 % Wilson intervals, for a terminal of `width` columns, at least 60."""
    return _table(accuracy_rows(results), f"{score_title(metric)} (95 % interval)", width)


def value_table(
    results: Mapping[str, Mapping[str, Accuracy]], key: str, metric: Metric, width: int = _WIDTH
) -> FittingTable:
    """Show the accuracies by the values of an own key."""
    return _table(value_rows(results, key), f"{score_title(metric)} by {printable(key)} (95 % interval)", width)


def score_title(metric: Metric) -> str:
    """Name what a table shows."""
    return "Token F1 in %" if metric == "token_f1" else f"Accuracy in %, {METRIC_NAMES[metric]}"


def most_labels(width: int) -> int:
    """Return how many labels a table of answers by reference can have in `width` columns."""
    return (width - 14) // 6 - 1


def confusion_table(counts: Confusion, name: str, width: int = _WIDTH) -> FittingTable:
    """Show how often each answer was given for each reference."""
    room = max(3, min(12, (width - 14) // (len(counts.labels) + 1) - 2))
    heading = ["reference", *(printable(label)[:room] for label in counts.labels), "other"[:room]]
    body = [[printable(label)[:12], *map(str, row)] for label, row in zip(counts.labels, counts.counts, strict=True)]
    return _table([heading, *body], f"Answers of {name} by reference", width)


def _table(rows: Sequence[Sequence[str]], title: str, width: int) -> FittingTable:
    heading, *body = _fitted(rows, width)
    # The number of questions goes first where there is no room, then the models beside the tuned one.
    ranks = [MUST] * len(heading)
    if rows[0][1] == "questions":
        ranks = [MUST, len(heading), *range(len(heading) - 3, -1, -1)]
    columns = [Column(name, is_number=place > 0, importance=ranks[place]) for place, name in enumerate(heading)]
    table = FittingTable(title, columns)
    for row in body:
        table.add(*row)
    return table


def _fitted(rows: Sequence[Sequence[str]], width: int) -> Sequence[Sequence[str]]:
    """Break cells so that the table fits: the interval on a line of its own, then on two, with short headings."""
    broken = [[*row[:2], *(cell.replace(" (", "\n(") for cell in row[2:])] for row in rows]
    narrow = [[cell.replace(" (", "\n(") for cell in row[:2]] + [_in_lines(cell) for cell in row[2:]] for row in rows]
    narrow[0][1] = {"questions": "n"}.get(narrow[0][1], narrow[0][1])
    return next((form for form in (rows, broken) if _width(form) <= width), narrow)


def _in_lines(cell: str) -> str:
    score, bracket, interval = cell.partition(" (")
    return f"{score}\n({interval.replace('-', '-' + chr(10))}" if bracket else cell


def _width(rows: Sequence[Sequence[str]]) -> int:
    columns = zip(*rows, strict=True)
    return sum(2 + max(len(line) for cell in column for line in cell.split("\n")) for column in columns) - 1


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
