from __future__ import annotations

import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from lora_llava.evaluation.figures import SheetItem, ShownAnswer, contact_sheet, plot_loss, smoothed
from lora_llava.evaluation.report import (
    accuracy_markdown,
    accuracy_rows,
    accuracy_table,
    confusion_table,
    max_labels,
    value_table,
)
from lora_llava.evaluation.scoring.confusion import Confusion
from lora_llava.evaluation.scoring.metrics import accuracy_by_type, accuracy_by_value
from lora_llava.generation.output import write_table

ANSWERS = ["yes", "no", "2", "left lung"]
RESULTS = {
    "base": accuracy_by_type([1, 0, 0, 0], ANSWERS),
    "tuned": accuracy_by_type([1, 1, 1, 0], ANSWERS),
}


def test_predictions_are_one_json_object_a_line(tmp_path: Path) -> None:
    rows = [{"id": "7", "question": "Où ?\n"}, {"id": "8", "image": None}]
    write_table(tmp_path / "predictions.jsonl", rows)
    raw = (tmp_path / "predictions.jsonl").read_bytes()
    assert raw.count(b"\n") == 2
    assert b"\r" not in raw
    assert "Où".encode() in raw
    assert [json.loads(line) for line in raw.splitlines()] == rows


def test_accuracy_rows_show_each_question_group_once() -> None:
    assert accuracy_rows(RESULTS) == [
        ["answers", "questions", "base", "tuned"],
        ["all", "4", "25.0 (4.6-69.9)", "75.0 (30.1-95.4)"],
        ["closed (yes/no)", "2", "50.0 (9.5-90.5)", "100.0 (34.2-100.0)"],
        ["open", "2", "0.0 (0.0-65.8)", "50.0 (9.5-90.5)"],
        ["open: number", "1", "0.0 (0.0-79.3)", "100.0 (20.7-100.0)"],
        ["open: other", "1", "0.0 (0.0-79.3)", "0.0 (0.0-79.3)"],
    ]
    assert accuracy_rows({"base": accuracy_by_type([], [])})[1] == ["all", "0", "-"]


def test_k68_a_model_that_was_asked_less_has_the_number_in_its_heading() -> None:
    rows = accuracy_rows({"base": accuracy_by_type([1, 0], ANSWERS[:2]), "tuned": RESULTS["tuned"]})
    assert rows[0] == ["answers", "questions", "base (2)", "tuned"]
    assert rows[1][1] == "4"


@pytest.mark.parametrize("width", [60, 80, 160])
def test_tables_fit_the_terminal(width: int) -> None:
    console = Console(width=width)
    names = ("majority", "base (300)", "start", "tuned")
    wide = accuracy_by_type([1] * 1200, ["yes", "2", "left lung"] * 400)
    values = accuracy_by_value([1] * 40, [f"a long name of patient {number}" for number in range(40)])
    with console.capture() as capture:
        console.print(accuracy_table(dict.fromkeys(names, wide), "vqa_v2", width))
        console.print(value_table(dict.fromkeys(names[1:], values), "patient", "token_f1", width))
        labels = [f"label number {number}" for number in range(min(10, max_labels(width)))]
        counts = Confusion(labels, [[9999] * (len(labels) + 1)] * len(labels))
        console.print(confusion_table(counts, "tuned", width))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    assert not any("\N{HORIZONTAL ELLIPSIS}" in line for line in lines if "a long name" not in line)
    assert "Accuracy in %, VQA v2 (95 % interval)" in capture.get()
    assert max_labels(80) == 10
    assert "and 28 more" in capture.get()
    assert ("100.0 (99.7-100.0)" in capture.get()) == (width == 160)


def test_accuracy_table_and_markdown_show_the_rows() -> None:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(accuracy_table({"[red]base": RESULTS["base"]}, "exact_match", 80))
    shown = capture.get()
    assert "[red]base" in shown
    assert "25.0 (4.6-69.9)" in shown
    lines = accuracy_markdown({"a|b": RESULTS["base"]}).splitlines()
    assert lines[0].replace(" ", "") == "|answers|questions|a\\|b|"
    assert set(lines[1]) <= set("|-: ")
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 2 + 5


def picture(width: int, height: int, color: tuple[int, int, int] = (200, 30, 60)) -> Image.Image:
    return Image.new("RGB", (width, height), color)


def pixels(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def item(image: Image.Image, text: str = "q?", base: float = 0, tuned: float = 1, is_cut: bool = False) -> SheetItem:
    answers = [ShownAnswer("base", text, base, is_cut), ShownAnswer("tuned", text, tuned)]
    return SheetItem(image, text, text, answers)


def has(color: str, shown: np.ndarray[Any, Any]) -> bool:
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(shown - wanted).sum(-1) < 12).any())


def test_contact_sheet_shows_images_and_marks(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    contact_sheet(path, [item(picture(28, 28), base=1)], "one")
    # Below the legend, which has both marks.
    shown = pixels(path)[90:]
    assert has("#c81e3c", shown)
    assert has("#1a7f37", shown)
    assert not has("#c62828", shown)
    contact_sheet(path, [item(picture(28, 28, (0, 0, 255)), tuned=0)], "two")
    shown = pixels(path)[90:]
    assert has("#c62828", shown)
    assert not has("#1a7f37", shown)


def test_contact_sheet_grows_by_rows(tmp_path: Path) -> None:
    shapes = []
    for count in (1, 4, 5, 12):
        contact_sheet(tmp_path / "s.png", [item(picture(30, 20))] * count, "t")
        shapes.append(pixels(tmp_path / "s.png").shape)
    assert shapes[0][1] < shapes[1][1] == shapes[2][1] == shapes[3][1]
    assert shapes[0][0] == shapes[1][0] < shapes[2][0] < shapes[3][0]


@pytest.mark.parametrize(
    "text",
    [
        "costs $5 or $6",
        "$\\frac{1}{$ _^",
        "",
        " \n\t\x00\x1b[31m",
        "x" * 500,
        "word " * 300,
        "肿瘤 \U0001f600 ورم",
        "<b>&",
    ],
)
def test_contact_sheet_takes_any_text_without_warning(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        contact_sheet(tmp_path / "s.png", [item(picture(9, 900), text, tuned=0.3, is_cut=True)], text[:20])
    assert not caplog.records
    # However long the text, the sheet stays a sheet.
    assert pixels(tmp_path / "s.png").shape[0] < 700


def test_contact_sheet_refuses_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet(tmp_path / "s.png", [], "none")


def log_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"stage": stage, "step": step, "loss": 3 / step, "learning_rate": 1e-3 / step}
        for stage in ("align", "instruct")
        for step in range(1, 60)
    ]
    rows[7]["loss"] = math.nan
    rows.append({"stage": "instruct", "step": 59, "eval_loss": 0.4, "samples": [{"question": "q"}]})
    return rows


def test_loss_plot_has_a_panel_for_each_stage(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_loss(tmp_path / "one.png", log_rows()[:59])
        plot_loss(tmp_path / "two.png", log_rows())
    one, two = pixels(tmp_path / "one.png"), pixels(tmp_path / "two.png")
    assert two.shape[1] == 2 * one.shape[1]
    assert has("#14507f", one)
    assert not has("#d9730d", one)
    assert has("#d9730d", two)


def test_loss_plot_has_a_line_for_each_of_a_few_sources(tmp_path: Path) -> None:
    names = ["_own.json", "a $\\frac name", "replay", "long" * 20, "fifth"]
    colors = ["#7b3fa0", "#1a7f37", "#c62828", "#b58900"]
    for count in (2, 4, 5):
        rows = [{**row, **{f"loss/{name}": row["loss"] + 1 for name in names[:count]}} for row in log_rows()[59:118]]
        for row in rows:
            # Apart, so that no line hides another.
            row |= {key: row[key] + 0.1 * number for number, key in enumerate(row) if key.startswith("loss/")}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plot_loss(tmp_path / "loss.png", rows)
        drawn = pixels(tmp_path / "loss.png")
        assert [has(color, drawn) for color in colors] == [count < 5 and number < count for number in range(4)]


@pytest.mark.parametrize("count", [0, 1])
def test_loss_plot_takes_a_log_that_has_hardly_begun(tmp_path: Path, count: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_loss(tmp_path / "loss.png", log_rows()[:count])
    assert pixels(tmp_path / "loss.png").shape[2] == 3


def test_smoothing_is_centred_and_keeps_gaps() -> None:
    assert smoothed([]) == []
    assert smoothed([2.0]) == [2.0]
    assert smoothed([5.0] * 40) == pytest.approx([5.0] * 40)
    ramp = [float(x) for x in range(100)]
    assert smoothed(ramp)[20:80] == pytest.approx(ramp[20:80])
    gap = smoothed([1.0, math.nan, 1.0])
    assert math.isnan(gap[1])
    assert [gap[0], gap[2]] == pytest.approx([1.0, 1.0])
