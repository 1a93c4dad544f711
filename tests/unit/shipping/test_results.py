"""Results of a run that the card cannot show: refused with the file and the value, before anything is uploaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_llava.errors import ArtifactError
from lora_llava.shipping.hub.prepare import prepare

FINISHED = Path(__file__).parents[2] / "fixtures" / "earlier_run" / "finished"
FIGURES = {"accuracy": 0.5, "low": 0.25, "high": 0.75, "correct": 2, "questions": 4}
TABLE = {**FIGURES, "by_type": {"closed": FIGURES, "open|x": FIGURES}}
ACCURACY = {"questions": 4, "images": 2, "metric": "exact_match", "base": TABLE, "tuned": TABLE, "blind": None}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with an evaluation."""
    shutil.copytree(FINISHED, tmp_path / "run")
    (tmp_path / "run" / "evaluation").mkdir()
    (tmp_path / "run" / "evaluation" / "accuracy.json").write_text(json.dumps(ACCURACY), encoding="utf-8")
    return tmp_path / "run"


def changed(path: Path, place: str, value: Any) -> None:
    content = holder = json.loads(path.read_text(encoding="utf-8"))
    *sections, name = place.split("/")
    for section in sections:
        holder = holder[section]
    holder[name] = value
    path.write_text(json.dumps(content), encoding="utf-8")


def test_k49_results_are_shown(run: Path) -> None:
    card = prepare(run / "instruct", "someone/model", run=run).card
    assert "4 questions about 2 images" in card
    assert "1.586" in card and "Time: 3 s" in card


@pytest.mark.parametrize(
    ("file", "place", "value", "problem"),
    [
        ("summary.json", "seconds", [], "seconds is [], must be a mapping"),
        ("summary.json", "seconds/align", "x", "seconds.align is 'x', must be a number"),
        ("summary.json", "seconds/align", float("nan"), "seconds.align is nan, must be a number"),
        ("summary.json", "peak_memory_bytes", 10**400, "peak_memory_bytes is 1000"),
        ("summary.json", "instruct", 5, "instruct is 5, must be a mapping"),
        ("summary.json", "align/steps", {}, "align.steps is {}, must be a number"),
        ("summary.json", "align/train_loss", True, "align.train_loss is True, must be a number"),
        ("summary.json", "align/best_step", "1", "align.best_step is '1', must be a number"),
        ("evaluation/accuracy.json", "questions", "4", "questions is '4', must be a number"),
        ("evaluation/accuracy.json", "metric", [], "metric is [], must be one of exact_match"),
        ("evaluation/accuracy.json", "metric", "bleu", "metric is 'bleu', must be one of exact_match"),
        ("evaluation/accuracy.json", "tuned", "x", "tuned is 'x', must be a mapping"),
        ("evaluation/accuracy.json", "tuned/low", None, "tuned.low is None, must be a number"),
        ("evaluation/accuracy.json", "tuned/by_type", None, "tuned.by_type is None, must be a mapping"),
        ("evaluation/accuracy.json", "base/by_type/closed", 1, "base.by_type.closed is 1, must be a mapping"),
        ("evaluation/accuracy.json", "base/by_type/closed", {}, "base.by_type.closed.accuracy is None"),
    ],
)
def test_k49_a_result_that_cannot_be_shown_is_named(run: Path, file: str, place: str, value: Any, problem: str) -> None:
    changed(run / file, place, value)
    with pytest.raises(ArtifactError) as caught:
        prepare(run / "instruct", "someone/model", run=run)
    assert str(caught.value).startswith(f"{run / file} is damaged ({problem}")
    assert str(caught.value).endswith("; remove it to publish without its information")


@pytest.mark.parametrize(
    ("file", "place"),
    [
        ("summary.json", "seconds"), ("summary.json", "instruct"), ("summary.json", "align/train_loss"),
        ("summary.json", "align/steps"), ("summary.json", "align/supervised_tokens"), ("summary.json", "hardware"),
        ("summary.json", "peak_memory_bytes"), ("evaluation/accuracy.json", "questions"),
        ("evaluation/accuracy.json", "metric"), ("evaluation/accuracy.json", "base"),
        ("evaluation/accuracy.json", "tuned"), ("instruct/manifest.json", "seen/steps"),
        ("instruct/manifest.json", "data/records"), ("instruct/manifest.json", "metrics/train_loss"),
        ("instruct/manifest.json", "metrics/best_eval_loss"),
    ],
)  # fmt: skip
def test_k49_a_result_that_is_unknown_is_left_out(run: Path, file: str, place: str) -> None:
    """JSON has no NaN: a loss that was NaN is null."""
    changed(run / file, place, None)
    assert "# model" in prepare(run / "instruct", "someone/model", run=run).card


@pytest.mark.parametrize("place", ["seen/steps", "seen/supervised_tokens", "seen/conversations", "data/records"])
def test_k49_a_count_in_a_manifest_is_a_number(run: Path, place: str) -> None:
    changed(run / "instruct" / "manifest.json", place, "many")
    key = place.replace("/", r"\.")
    with pytest.raises(ArtifactError, match=rf"manifest\.json is damaged \({key} is 'many', must be a number"):
        prepare(run / "instruct", "someone/model", run=run)
