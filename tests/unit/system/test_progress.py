"""Progress and tables at any width: what matters is always seen, nothing is cut."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lora_llava.data.stage import StepCounts
from lora_llava.modeling.structure import PartParameters
from lora_llava.planning.tables import parameter_table_view
from lora_llava.system.progress import Bar, counting, duration, phase, shown_on
from lora_llava.system.table import Column, FittingTable
from lora_llava.training.log import TrainingLog

WIDTHS = (60, 80, 100, 120, 160)
FIGURES = ["loss 12.3456", "lr 2.00e-04", "123.4 questions/s", "1234 supervised tokens/s", "gradients: a 1, b 2"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that is set by hand."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: now.seconds)
    return now


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, highlight=False)


def text_of(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("total", "label"), [(12, "align"), (12_345, "instruct")])
def test_k28_label_count_loss_and_time_left_are_seen_at_any_width(
    clock: SimpleNamespace, width: int, total: int, label: str
) -> None:
    bar = Bar(label, total, terminal(width))
    bar.start(0)
    bar.figures = FIGURES
    clock.seconds += 2.0
    bar.update(1)
    line = bar.line(width - 1)
    assert len(line) < width
    assert line.startswith((f"{label} \N{BOX DRAWINGS LIGHT HORIZONTAL}", f"{label} \N{BOX DRAWINGS HEAVY HORIZONTAL}"))
    for seen in (f"1/{total:,}", "loss 12.3456", f"{duration(2.0 * (total - 1))} left"):
        assert seen in line
    assert ("gradients" in line) == (width == 160)
    assert not any(figure[:-1] in line and figure not in line for figure in FIGURES)


def test_k61_the_time_left_is_known_from_the_first_step_and_follows_the_work(clock: SimpleNamespace) -> None:
    bar = Bar("instruct", 3, terminal(60))
    bar.start(0, 0)
    assert "-:-- left" in bar.line(59)
    clock.seconds += 10.0
    bar.update(1, 100, 400)
    assert "0:30 left" in bar.line(59)
    clock.seconds += 5.0
    assert "0:25 left" in bar.line(59)
    clock.seconds += 15.0
    bar.update(2, 300, 400)
    assert "0:10 left" in bar.line(59)


def test_k61_a_resumed_run_counts_its_own_steps_alone(clock: SimpleNamespace) -> None:
    bar = Bar("instruct", 100, terminal(60))
    bar.start(90)
    clock.seconds += 3.0
    bar.update(91)
    assert bar.seconds_left == pytest.approx(27.0)


def test_durations() -> None:
    assert [duration(one) for one in (0.2, 53, 725, 3753)] == ["0:00", "0:53", "12:05", "1:02:33"]


def train_log(console: Console, path: Path, steps: int = 40) -> Any:
    log: Any = TrainingLog("instruct", path, [StepCounts(8, 40, 500)] * steps, console)
    state = SimpleNamespace(global_step=0, max_steps=steps, is_local_process_zero=True)
    control = SimpleNamespace(should_log=False, should_evaluate=False)
    log.on_train_begin(None, state, control)
    for step in (1, 2):
        state.global_step = step
        log.on_step_end(None, state, control)
        logs = {"loss": 2.5 / step, "learning_rate": 2e-4, "grad_norm_lora": 0.5, "epoch": 0.1}
        log.on_log(None, state, control, logs)
    log.on_train_end(None, state, control)
    return log


def test_the_rates_leave_out_validations_and_checkpoints_but_not_the_wait_for_data(
    tmp_path: Path, clock: SimpleNamespace
) -> None:
    log: Any = TrainingLog("instruct", tmp_path / "log.jsonl", [StepCounts(8, 40, 500)] * 3, Console(quiet=True))
    state = SimpleNamespace(global_step=0)
    log.on_train_begin(None, state, None)
    for step, (computing, validating, saving) in enumerate([(2.0, 7.0, 5.0), (1.0, 0.0, 30.0), (1.0, 0.0, 0.0)], 1):
        state.global_step = step
        # The rows of a step are read before it begins.
        clock.seconds += computing
        log.on_step_end(None, state, None)
        if step != 2:
            log.on_log(None, state, None, {"loss": 1.0, "learning_rate": 1e-3})
        clock.seconds += validating
        if validating:
            log.on_log(None, state, None, {"eval_loss": 1.0})
            log.on_evaluate(None, state, None)
        clock.seconds += saving
        if saving:
            log.on_save(None, state, None)
    rows = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    assert [(row["questions_per_second"], row["seconds"]) for row in rows if "loss" in row] == [(4.0, 2.0), (8.0, 46.0)]


@pytest.mark.parametrize("width", WIDTHS)
def test_k28_each_log_leaves_its_loss_above_the_bar(tmp_path: Path, width: int) -> None:
    console = terminal(width)
    train_log(console, tmp_path / "log.jsonl")
    lines = [line.strip() for line in text_of(console).replace("\r", "\n").replace("\x1b[2K", "").splitlines()]
    for step, loss in ((1, "2.5000"), (2, "1.2500")):
        [left] = [line for line in lines if line.startswith(f"instruct {step}/40: loss {loss}")]
        assert len(left) < width


def test_k28_without_a_terminal_each_log_is_a_line_with_all_figures(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=160)
    train_log(console, tmp_path / "log.jsonl")
    lines = text_of(console).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("instruct 1/40: loss 2.5000  lr 2.00e-04  ")
    assert "gradients: lora 0.5" in lines[0]
    assert lines[0].endswith(" left")


TYPES = "bfloat16, float32, nf4"
ROWS = [
    PartParameters("model.vision_tower", 303_507_456, 0, 0, 0, "bfloat16", 607_014_912),
    PartParameters("model.multi_modal_projector", 20_979_712, 20_979_712, 0, 0, "float32", 167_837_696),
    PartParameters(
        "model.language_model", 6_607_343_616, 319_815_680, 6_476_005_376, 319_815_680, "bfloat16, float32, nf4", 9**10
    ),
    PartParameters("lm_head", 131_334_144, 0, 0, 0, "bfloat16", 262_668_288),
]


@pytest.mark.parametrize("width", [40, *WIDTHS])
def test_k28_a_table_cuts_neither_a_name_nor_a_number(width: int) -> None:
    console = terminal(width)
    console.print(parameter_table_view(ROWS, "Parameters"))
    text = text_of(console)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert max(map(len, text.splitlines())) <= max(width, 47)
    for number in ("303,507,456", "20,979,712", "6,607,343,616", "319,815,680"):
        assert number in text
    if width >= 60:
        assert all(part.part.removeprefix("model.") in text for part in ROWS)
    assert ("6,476,005,376" in text) == (width >= 100)
    assert ("Columns that do not fit" in text) == (width < 120)
    assert ("  303,507,456" in text) and "\nlm_head" in text


def test_k28_texts_fold_before_a_number_is_cut() -> None:
    table = FittingTable("Long", [Column("name", is_number=False), Column("count")])
    table.add("a-name-that-is-longer-than-the-terminal-is-wide", "1,234,567")
    console = terminal(30)
    console.print(table)
    assert "1,234,567" in text_of(console)
    shown = "".join(char for char in text_of(console) if char.isalnum() or char == "-").replace("1234567", "")
    assert "a-name-that-is-longer-than-the-terminal-is-wide" in shown
    assert "\N{HORIZONTAL ELLIPSIS}" not in text_of(console)


def test_phases_and_counts_are_silent_until_a_command_shows_them() -> None:
    console = Console(file=io.StringIO(), width=80)
    phase("unseen")
    with counting("unseen", 3) as advance:
        advance(3)
    with shown_on(console):
        phase("Loading PyTorch")
        with counting("items", 3) as advance:
            advance(3)
    phase("unseen")
    assert text_of(console).splitlines() == ["Loading PyTorch ..."]


def test_k61_long_work_off_a_terminal_says_each_tenth_with_the_time_left(clock: SimpleNamespace) -> None:
    console = Console(file=io.StringIO(), width=80)
    with shown_on(console), counting("writing text.gguf", 100) as advance:
        for _ in range(100):
            clock.seconds += 2.0
            advance(1)
    lines = text_of(console).splitlines()
    assert lines[0] == "writing text.gguf: 10/100, 3:00 left"
    assert lines[-1] == "writing text.gguf: 100/100"
    assert len(lines) == 10
