"""Confusion tables for small sets of answers; precision, recall, F1 and bias of yes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_llava.evaluation.scoring.exact_match import answer_tokens, exact_match
from lora_llava.evaluation.scoring.metrics import Difference, difference

_MAX_LABELS = 10
_YES, _NO = ("yes",), ("no",)


@dataclass(frozen=True, slots=True)
class Confusion:
    """Counts by reference (rows) and answer (columns); the last column counts answers that are no label."""

    labels: list[str]
    counts: list[list[int]]

    @property
    def yes(self) -> dict[str, float | None] | None:
        """Precision, recall and F1 of yes among yes/no references; None where undefined."""
        if not {"yes", "no"} <= set(self.labels):
            return None
        yes, no = self.labels.index("yes"), self.labels.index("no")
        hits, references = self.counts[yes][yes], sum(self.counts[yes])
        answers = hits + self.counts[no][yes]
        both = answers + references
        return {
            "precision": round(hits / answers, 5) if answers else None,
            "recall": round(hits / references, 5) if references else None,
            "f1": round(2 * hits / both, 5) if both else None,
        }

    @property
    def yes_bias(self) -> Difference | None:
        """Share of yes among the answers to yes/no questions minus that among their references; None without any."""
        if not {"yes", "no"} <= set(self.labels):
            return None
        column = self.labels.index("yes")
        answers: list[float] = []
        references: list[float] = []
        for label in ("yes", "no"):
            row = self.counts[self.labels.index(label)]
            answers += [1.0] * row[column] + [0.0] * (sum(row) - row[column])
            references += [float(label == "yes")] * sum(row)
        return difference(answers, references) if answers else None

    def as_json(self) -> dict[str, Any]:
        """Return the table as in `accuracy.json`; the bias in percentage points."""
        table = {"answers": [*self.labels, "other"], "references": self.labels, "counts": self.counts}
        if self.yes is None:
            return table
        bias = self.yes_bias
        return {**table, "yes": self.yes, "yes_bias": bias and bias.in_points()}


def confusion(references: Sequence[str], predictions: Sequence[str]) -> Confusion | None:
    """Count answers by reference if there are few distinct references, else only those of yes/no questions.

    Few means at most `_MAX_LABELS`, each occurring twice on average. None if there is nothing to count.
    """
    keys = [answer_tokens(reference) or (reference.strip(),) for reference in references]
    counts = Counter(keys)
    if not 1 < len(counts) <= _MAX_LABELS or len(keys) < 2 * len(counts):
        counts = Counter(key for key in keys if key in (_YES, _NO))
    if not counts:
        return None
    if counts.keys() & {_YES, _NO}:
        counts.update({_YES: 0, _NO: 0})
    ordered = sorted(counts, key=lambda key: (key != _YES, key != _NO, -counts[key], key))
    spelled = {key: reference.strip() for key, reference in reversed([*zip(keys, references, strict=True)])}
    labels = [" ".join(key) if key in (_YES, _NO) else spelled[key] for key in ordered]
    table = [[0] * (len(labels) + 1) for _ in labels]
    for key, prediction in zip(keys, predictions, strict=True):
        if key in counts:
            column = next((index for index, label in enumerate(labels) if exact_match(prediction, label)), len(labels))
            table[ordered.index(key)][column] += 1
    return Confusion(labels, table)
