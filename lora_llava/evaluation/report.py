"""Tables of results: accuracies, and answers by reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
from lora_llava.system.table import MUST, Column, FittingTable, markdown_table
from lora_llava.system.text import printable

MAJORITY = "majority"
"""Column for always giving the most frequent answer."""
_LABELS = {CLOSED: "closed (yes/no)", NUMBER: "open: number", OTHER: "open: other"}
_MAX_VALUES = 12
"""Values of a key of the data that a table lists."""
_MAX_LABEL = 20


def accuracy_rows(results: Mapping[str, Mapping[str, Accuracy]]) -> list[list[str]]:
    """Return accuracies as rows of text, the heading first: group, number of questions, then one column per model.

    `results` maps the name of a model to the result of `accuracy_by_type`. The heading of a model that was asked fewer
    questions than others gives their number.
    """
    groups = [group for group in GROUPS if any(group in table for table in results.values())]
    if CLOSED in groups:
        # Closed questions are the yes/no questions.
        groups = [group for group in groups if group != YES_NO]
    return _rows(results, ALL, groups, "answers", _LABELS)


def _rows(
    results: Mapping[str, Mapping[str, Accuracy]],
    whole: str,
    groups: Sequence[str],
    heading: str,
    labels: Mapping[str, str],
) -> list[list[str]]:
    """Return accuracies as rows of text, the heading first; `whole`: the group of all questions, if there is one."""
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


def _value_rows(results: Mapping[str, Mapping[str, Accuracy]], key: str) -> list[list[str]]:
    """Return accuracies by the values of a key of the data, as `accuracy_rows` does; most frequent values first."""
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
        # The baseline is computed from these questions, so it has no interval.
        return f"{100 * accuracy.share:.1f}"
    return f"{100 * accuracy.share:.1f} ({100 * accuracy.low:.1f}-{100 * accuracy.high:.1f})"


def accuracy_table(results: Mapping[str, Mapping[str, Accuracy]], metric: Metric, width: int) -> FittingTable:
    """Return accuracies in percent with 95 % Wilson intervals, for a terminal of at least 60 columns."""
    return _table(accuracy_rows(results), f"{_score_title(metric)} (95 % interval)", width)


def value_table(results: Mapping[str, Mapping[str, Accuracy]], key: str, metric: Metric, width: int) -> FittingTable:
    """Return the accuracies by the values of a key of the data."""
    return _table(_value_rows(results, key), f"{_score_title(metric)} by {printable(key)} (95 % interval)", width)


def _score_title(metric: Metric) -> str:
    """Return the title of a table of scores."""
    return "Token F1 in %" if metric == "token_f1" else f"Accuracy in %, {METRIC_NAMES[metric]}"


def max_labels(width: int) -> int:
    """Return how many labels a table of answers by reference can show in `width` columns."""
    return (width - 14) // 6 - 1


def confusion_table(counts: Confusion, name: str, width: int) -> FittingTable:
    """Return how often each answer was given for each reference."""
    room = max(3, min(12, (width - 14) // (len(counts.labels) + 1) - 2))
    heading = ["reference", *(printable(label)[:room] for label in counts.labels), "other"[:room]]
    body = [[printable(label)[:12], *map(str, row)] for label, row in zip(counts.labels, counts.counts, strict=True)]
    return _table([heading, *body], f"Answers of {name} by reference", width)


def _table(rows: Sequence[Sequence[str]], title: str, width: int) -> FittingTable:
    heading, *body = _fitted(rows, width)
    # Without room, drop the number of questions first, then the models other than the tuned one.
    ranks = [MUST] * len(heading)
    if rows[0][1] == "questions":
        ranks = [MUST, len(heading), *range(len(heading) - 3, -1, -1)]
    columns = [Column(name, is_number=rank > 0, importance=ranks[rank]) for rank, name in enumerate(heading)]
    table = FittingTable(title, columns)
    for row in body:
        table.add(*row)
    return table


def _fitted(rows: Sequence[Sequence[str]], width: int) -> Sequence[Sequence[str]]:
    """Break cells so that the table fits: put the interval on a second line, then on two lines with short headings."""
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
    """Return the accuracies as a Markdown table that also lines up as plain text."""
    heading, *rows = accuracy_rows(results)
    return markdown_table(heading, rows, align=True) + "\n"
