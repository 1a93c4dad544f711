"""`check.html`: the report as one page without scripts or network requests."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from lora_llava import __version__
from lora_llava.data.images.read import open_image
from lora_llava.data.record import ImageSource, Record
from lora_llava.data.sampling import spread
from lora_llava.doctor.catalogue import KINDS, SEVERITIES
from lora_llava.doctor.compare import Finding
from lora_llava.doctor.conversations import text_runs
from lora_llava.doctor.report import Report
from lora_llava.doctor.survey import Side
from lora_llava.errors import DataError
from lora_llava.system.text import printable

_NUM_SAMPLES = 10
"""Records shown as the model gets them."""

_NUM_SHOWN = 6
"""Findings of a kind shown with their images."""
_NUM_NAMED = 50
"""Findings of a kind listed."""
_SIDE = 168
"""Longer side of a picture, in pixels."""
_MAX_TEXT, _MAX_PROBLEM = 3000, 1000
"""Characters of a sample and of a problem."""
_FIGURES = {
    "tokens": "Tokens of a conversation",
    "supervised_tokens": "Supervised tokens of a conversation",
    "turns": "Questions of a conversation",
    "answers": "Answers",
    "image_width": "Image width, pixels",
    "image_height": "Image height, pixels",
}


def write_page(report: Report) -> str:
    """Return the page. Text from the data is escaped, and a content policy allows only the embedded pictures."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(
        resources.files("lora_llava.doctor").joinpath("page.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        recipe=report.survey.recipe.name,
        version=__version__,
        seconds=f"{report.seconds:.0f}",
        counts={severity: report.count(severity) for severity in SEVERITIES},
        findings=[_kind(kind, findings) for kind, findings in report.findings.items()],
        lists=report.lists,
        sources=report.survey.sources,
        sides=[_side(name, figures) for name, figures in report.figures.items()],
        plans=_plans(report),
        mixes=report.conversations.mixes,
        samples=list(_samples(report)),
    )


def _kind(kind: str, findings: list[Finding]) -> dict[str, Any]:
    described = KINDS[kind]
    shown = [finding for finding in findings if finding.images][:_NUM_SHOWN]
    return {
        **described._asdict(),
        "count": sum(finding.count for finding in findings),
        "shown": [
            {
                "problem": printable(finding.problem, _MAX_PROBLEM),
                "pictures": [picture for image in finding.images if (picture := _picture(image))],
            }
            for finding in shown
        ],
        "named": [printable(finding.problem, _MAX_PROBLEM) for finding in findings[:_NUM_NAMED]],
        "more": max(0, len(findings) - _NUM_NAMED),
    }


def _side(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Return the counts of a side, and its charts as (title, bars); a bar is (label, count, percent of the highest)."""
    charts = []
    for key, title in _FIGURES.items():
        if bars := figures.get(key):
            highest = max(bar["count"] for bar in bars)
            rows = [(bar["label"], bar["count"], round(100 * bar["count"] / highest, 1)) for bar in bars]
            charts.append((title, rows))
    counts = {key: value for key, value in figures.items() if isinstance(value, int)}
    return {"name": name, "counts": counts, "charts": charts}


def _plans(report: Report) -> list[tuple[str, dict[str, Any], list[str]]]:
    """Return the numbers and the sentences of each stage's plan."""
    return [
        (
            stage,
            {
                key.replace("_", " "): f"{value:.0%}" if isinstance(value, float) else value
                for key, value in plan.items()
                if not isinstance(value, str)
            },
            [value for value in plan.values() if isinstance(value, str)],
        )
        for stage, plan in report.conversations.plans.items()
    ]


def _samples(report: Report) -> Iterator[dict[str, Any]]:
    """Yield records as the model gets them, evenly from all sides."""
    for side, record in _sampled(report):
        runs, room = [], _MAX_TEXT
        for kind, text in text_runs(record, side, report.conversations):
            runs.append((kind, text[:room]))
            room -= len(text)
            if room <= 0:
                runs.append(("context", "\N{HORIZONTAL ELLIPSIS}"))
                break
        picture = _picture(record.image, 2 * _SIDE) if record.image else None
        yield {"side": side.name, "where": record.where, "picture": picture, "runs": runs}


def _sampled(report: Report) -> Iterator[tuple[Side, Record]]:
    """Yield `_NUM_SAMPLES` conversations in all, evenly spaced within each side."""
    with_records = [side for side in report.survey.sides if side.records]
    for number, side in enumerate(with_records):
        count = _NUM_SAMPLES // len(with_records) + (number < _NUM_SAMPLES % len(with_records))
        for record in spread(report.conversations.records[side.name], count):
            yield side, record


def _picture(source: ImageSource, side: int = _SIDE) -> str | None:
    """Return a small copy of an image as a data URL; None if it cannot be opened."""
    try:
        image = open_image(source)
    except DataError:
        return None
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # PNG is smaller, and lossless, for small pictures.
    png = max(image.size) <= 96
    image.save(buffer, "PNG") if png else image.save(buffer, "JPEG", quality=80)
    return f"data:image/{'png' if png else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
