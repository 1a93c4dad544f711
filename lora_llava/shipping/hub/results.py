"""What the results of a run must be before the card shows them: its files may have been edited, or be a stranger's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lora_llava.evaluation.outcome import BASE, BLIND, START, TUNED, TUNED_ON_BLIND
from lora_llava.evaluation.scoring.metrics import METRIC_NAMES
from lora_llava.formats.manifest import is_number
from lora_llava.recipe.stages import STAGES

_MODELS = (BASE, START, TUNED, BLIND, TUNED_ON_BLIND)
_FIGURES = ("accuracy", "low", "high", "correct", "questions")
_STAGE_NUMBERS = (
    "steps", "conversations", "supervised_tokens", "train_loss", "eval_loss", "best_step", "best_eval_loss",
    "last_step", "last_eval_loss",
)  # fmt: skip


def summary_problems(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield the values of a summary.json that the card cannot show, with what they must be."""
    yield from _numbers(summary, ("peak_memory_bytes",), "", optional=True)
    seconds = summary.get("seconds")
    yield from _mapping(seconds, "seconds", lambda values, where: _numbers(values, list(values), where))
    for stage in STAGES:
        yield from _mapping(
            summary.get(stage), stage, lambda values, where: _numbers(values, _STAGE_NUMBERS, where, optional=True)
        )


def accuracy_problems(accuracy: Mapping[str, Any]) -> Iterator[str]:
    """Yield the values of an accuracy.json that the card cannot show, with what they must be."""
    yield from _numbers(accuracy, ("questions", "images"), "", optional=True)
    if (metric := accuracy.get("metric")) is not None and metric not in list(METRIC_NAMES):
        yield _wrong("metric", metric, f"one of {', '.join(METRIC_NAMES)}")
    for model in _MODELS:
        yield from _mapping(accuracy.get(model), model, _in_table)


def _in_table(table: Mapping[str, Any], where: str) -> Iterator[str]:
    yield from _numbers(table, _FIGURES, where)
    if not isinstance(table.get("by_type"), dict):
        yield _wrong(f"{where}.by_type", table.get("by_type"), "a mapping")
        return
    for kind, figures in table["by_type"].items():
        inside = f"{where}.by_type.{kind}"
        if not isinstance(figures, dict):
            yield _wrong(inside, figures, "a mapping")
        else:
            yield from _numbers(figures, _FIGURES, inside)


def _mapping(value: Any, where: str, check: Callable[[dict[str, Any], str], Iterator[str]]) -> Iterator[str]:
    """Check a mapping that may be missing or empty."""
    if isinstance(value, dict):
        yield from check(value, where)
    elif value is not None:
        yield _wrong(where, value, "a mapping")


def _numbers(values: Mapping[str, Any], names: Sequence[str], where: str, *, optional: bool = False) -> Iterator[str]:
    """Check that values are numbers; `optional`: or null, or missing."""
    for name in names:
        value = values.get(name)
        if not (optional and value is None) and not is_number(value):
            yield _wrong(f"{where}.{name}" if where else name, value, "a number")


def _wrong(where: str, value: Any, needed: str) -> str:
    return f"{where:.80} is {value!r:.80}, must be {needed}"
