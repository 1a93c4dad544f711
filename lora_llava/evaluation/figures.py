"""Pictures of a run: the loss curve, and a contact sheet of test images with the models' answers."""

from __future__ import annotations

import logging
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from PIL.Image import Image

_RIGHT, _WRONG, _TEXT = "#1a7f37", "#c62828", "#1f2328"
_RAW, _SMOOTH, _VALIDATION, _RATE = "#9ec5e8", "#14507f", "#d9730d", "#8c959f"
_SOURCES = ("#7b3fa0", "#1a7f37", "#c62828", "#b58900")
"""Of the losses of a stage's sources; with more sources they are not drawn."""
_COLUMNS = 4
_MAX_NAME = 24
"""Characters of the name of a source."""
_COLUMN_INCHES = 3.4
_IMAGE_INCHES = 2.6
_LINE_INCHES = 0.19
_LINE_CHARACTERS = 40
_BOLD_CHARACTERS = 36


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """The answer of one model on a contact sheet."""

    name: str
    text: str
    score: float
    """Between 0 and 1."""
    is_cut: bool = False
    """Whether `max_new_tokens` cut it short."""


@dataclass(frozen=True, slots=True)
class SheetItem:
    """One test question of a contact sheet."""

    image: Image
    question: str
    answer: str
    """The reference."""
    answers: Sequence[ShownAnswer]


def contact_sheet(path: Path, items: Sequence[SheetItem], title: str, metric: str = "exact match") -> None:
    """Write a PNG: a title, a legend that names the metric, and test images with their question and marked answers.

    Raises ValueError if there are no items.
    """
    if not items:
        raise ValueError("a contact sheet needs at least one item")
    texts = [_sheet_lines(item) for item in items]
    columns = min(_COLUMNS, len(items))
    rows = math.ceil(len(items) / columns)
    # Each row of the sheet is as tall as its longest text.
    lines = [max(len(text) for text in texts[row * columns : (row + 1) * columns]) for row in range(rows)]
    heights = [_IMAGE_INCHES + (count + 1.2) * _LINE_INCHES for count in lines]
    head = 0.75
    size = (columns * _COLUMN_INCHES, sum(heights) + head)
    with _figure(path, size) as figure:
        style: dict[str, Any] = {"size": 13, "weight": "bold", "color": _TEXT, "parse_math": False}
        figure.text(0.15 / size[0], 1 - 0.14 / size[1], title, va="top", **style)
        _draw_legend(figure, size, _legend_of(items, metric))
        top = size[1] - head
        for row in range(rows):
            for column, index in enumerate(range(row * columns, min((row + 1) * columns, len(items)))):
                _sheet_cell(figure, size, (column * _COLUMN_INCHES + 0.15, top), items[index].image, texts[index])
            top -= heights[row]


def _sheet_lines(item: SheetItem) -> list[tuple[str, str, bool]]:
    """Return the lines below an image as (text, color, bold)."""
    lines = [(line, _TEXT, True) for line in _wrapped("", item.question, 3, _BOLD_CHARACTERS)]
    lines += [(line, _TEXT, False) for line in _wrapped("reference: ", item.answer, 2)]
    for answer in item.answers:
        mark, color = _marked(answer.score)
        text = (answer.text or "(nothing)") + ("\N{HORIZONTAL ELLIPSIS}" if answer.is_cut else "")
        lines += [(line, color, False) for line in _wrapped(f"{mark} {answer.name}: ", text, 2)]
    return lines


def _marked(score: float) -> tuple[str, str]:
    """Return the mark and color of a score."""
    if score in (0, 1):
        return ("\N{CHECK MARK}", _RIGHT) if score else ("\N{BALLOT X}", _WRONG)
    return f"{score:.2f}", _TEXT


def _legend_of(items: Sequence[SheetItem], metric: str) -> list[tuple[str, str]]:
    """Return the legend of the marks that occur, as (text, color)."""
    answers = [answer for item in items for answer in item.answers]
    pieces = [("\N{CHECK MARK} right", _RIGHT), ("\N{BALLOT X} wrong", _WRONG), (f"by {metric}", _TEXT)]
    if any(0 < answer.score < 1 for answer in answers):
        pieces.insert(2, ("0.50 in part", _TEXT))
    if any(answer.is_cut for answer in answers):
        pieces.append(("\N{HORIZONTAL ELLIPSIS} cut at max_new_tokens", _TEXT))
    return pieces


def _draw_legend(figure: Figure, size: tuple[float, float], pieces: Sequence[tuple[str, str]]) -> None:
    left = 0.15
    for text, color in pieces:
        figure.text(left / size[0], 1 - 0.45 / size[1], text, va="top", size=9, color=color, parse_math=False)
        left += 0.075 * len(text) + 0.22


def _wrapped(label: str, text: str, max_lines: int, width: int = _LINE_CHARACTERS) -> list[str]:
    """Wrap text to the width of a cell; an ellipsis marks what is cut after `max_lines`."""
    # Control characters in data have no glyph, and repeated whitespace no meaning here.
    clean = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return textwrap.wrap(label + clean, width, max_lines=max_lines, placeholder=" \N{HORIZONTAL ELLIPSIS}",
                         subsequent_indent="   " if label else "")  # fmt: skip


def _sheet_cell(
    figure: Figure,
    size: tuple[float, float],
    corner: tuple[float, float],
    image: Image,
    text: Sequence[tuple[str, str, bool]],
) -> None:
    """Draw an image and the text below it, with its upper left corner at `corner`, in inches from the lower left."""
    (width, height), (left, top) = size, corner
    axes = figure.add_axes(
        (left / width, (top - _IMAGE_INCHES) / height, _IMAGE_INCHES / width, _IMAGE_INCHES / height),
        anchor="SW",
    )
    # Show small images without interpolation, as the model gets them.
    small = max(image.size) < _IMAGE_INCHES * figure.dpi
    axes.imshow(image.convert("RGB"), interpolation="nearest" if small else "antialiased")
    axes.set_axis_off()
    for number, (line, color, bold) in enumerate(text):
        figure.text(
            left / width,
            (top - _IMAGE_INCHES - (number + 0.45) * _LINE_INCHES) / height,
            line,
            va="top",
            size=9,
            weight="bold" if bold else "normal",
            color=color,
            parse_math=False,
        )


def plot_loss(path: Path, log_rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a PNG with one panel per stage: raw and smoothed loss, validation loss and learning rate.

    `log_rows` are the lines of `train_log.jsonl`, with "stage", "step", and "loss", "learning_rate" or "eval_loss". Up
    to four sources ("loss/NAME") have a line each.
    """
    stages = list(dict.fromkeys(str(row["stage"]) for row in log_rows)) or ["no step was logged"]
    with _figure(path, (6.4 * len(stages), 4.2)) as figure:
        for column, stage in enumerate(stages):
            panel = figure.add_subfigure(figure.add_gridspec(1, len(stages))[0, column])
            _loss_panel(panel, stage, [row for row in log_rows if row["stage"] == stage])


def _loss_panel(panel: SubFigure, stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the losses and the learning rate of one stage."""
    from matplotlib.ticker import MaxNLocator

    axes = panel.add_axes((0.12, 0.15, 0.74, 0.72))
    rates = axes.twinx()
    steps, losses = _series(rows, "loss")
    marker = "." if len(steps) < 2 else ""  # a line with one point is invisible
    axes.plot(steps, losses, color=_RAW, linewidth=1, marker=marker, label="loss")
    axes.plot(steps, smoothed(losses), color=_SMOOTH, linewidth=1.8, label="loss, smoothed")
    names = dict.fromkeys(key for row in rows for key in row if key.startswith("loss/"))
    for name, color in zip(names, _SOURCES, strict=False) if len(names) <= len(_SOURCES) else ():
        of_source, values = _series(rows, name)
        label = f"of {_short(name.removeprefix('loss/'))}"
        axes.plot(of_source, smoothed(values), color=color, linewidth=1, marker=marker, label=label)
    axes.plot(
        *_series(rows, "eval_loss"),
        color=_VALIDATION,
        marker="o",
        markersize=4.5,
        linewidth=1,
        label="validation",
    )
    rates.plot(
        *_series(rows, "learning_rate"),
        color=_RATE,
        linewidth=0.8,
        linestyle=":",
        marker=marker,
        label="learning rate",
    )
    axes.set_title(stage, loc="left", weight="bold", parse_math=False)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("loss per supervised token")
    rates.set_ylabel("learning rate", color=_RATE)
    rates.tick_params(axis="y", colors=_RATE, labelsize=8)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rates.set_ylim(bottom=0)
    axes.set_zorder(rates.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.grid(color="#e7eaed", linewidth=0.8)
    for side in (axes, rates):
        side.spines["top"].set_visible(False)
    _legend(axes, rates)


def _legend(axes: Axes, rates: Axes) -> None:
    """Add a legend of the lines of both axes that have points."""
    lines = [line for line in (*axes.get_lines(), *rates.get_lines()) if len(line.get_xdata(orig=True))]  # type: ignore[arg-type]
    if lines:
        labels = [str(line.get_label()) for line in lines]
        legend = axes.legend(lines, labels, loc="upper right", fontsize=8, framealpha=0.85)
        for text in legend.get_texts():
            # A name may hold what looks like a formula.
            text.set_parse_math(False)


def _short(name: str) -> str:
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of the rows with `key`; a value that is not finite becomes NaN, a gap in the line."""
    points = [(int(row["step"]), float(row[key])) for row in rows if row.get(key) is not None]
    return [step for step, _ in points], [value if math.isfinite(value) else math.nan for _, value in points]


def smoothed(values: Sequence[float]) -> list[float]:
    """Smooth with a centered Gaussian window, which widens with the series; NaN stays NaN.

    Centered, so that the curve does not lag behind a falling loss.
    """
    width = max(1.0, min(12.0, len(values) / 30))
    reach = math.ceil(3 * width)
    averages: list[float] = []
    for index, value in enumerate(values):
        near = [
            (math.exp(-(((other - index) / width) ** 2) / 2), values[other])
            for other in range(max(0, index - reach), min(len(values), index + reach + 1))
            if not math.isnan(values[other])
        ]
        total = sum(weight for weight, _ in near)
        averages.append(math.nan if math.isnan(value) else sum(weight * v for weight, v in near) / total)
    return averages


@contextmanager
def _figure(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """Yield a white figure of `size` inches, then write it to `path` as PNG."""
    # Without pyplot there is no display, no global state and nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    yield figure
    fonts = logging.getLogger("matplotlib.font_manager")
    level = fonts.level
    fonts.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Data may be in any script; a character that the font lacks is drawn as a box.
            warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font", category=UserWarning)
            figure.savefig(path, format="png")
    finally:
        fonts.setLevel(level)
