"""Boxes in texts: LLaVA's are [x1, y1, x2, y2] from 0 to 1, relative to the image after padding to a square."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from lora_llava.data.record import Record
from lora_llava.doctor.compare import Finding, finding_at
from lora_llava.doctor.survey import Source, Survey
from lora_llava.system.text import counted

_NUMBER = r"\s*(-?\d{1,6}(?:\.\d{1,10})?)\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_MIN_OTHER_UNITS = 5
"""Lists of four integers that make them boxes in other units; fewer may be anything."""


class _Box(NamedTuple):
    """Four numbers in brackets."""

    text: str
    values: tuple[float, ...]

    @property
    def is_fraction(self) -> bool:
        """Whether a number has a decimal point, as all of LLaVA's do."""
        return "." in self.text

    @property
    def problem(self) -> str | None:
        """What makes it no box of LLaVA's; None if it is one."""
        left, top, right, bottom = self.values
        if not all(0 <= value <= 1 for value in self.values):
            return "leaves the image, which is 0 to 1"
        return None if left < right and top < bottom else "has no area: x1 < x2 and y1 < y2 must hold"


def box_findings(survey: Survey) -> Iterator[Finding]:
    """Yield boxes that leave the image, have no area, or are in pixels or thousandths."""
    for source in survey.sources:
        others: list[tuple[Record, _Box]] = []
        for record in source.records:
            for box in _boxes(record):
                if not box.is_fraction and max(box.values) > 1:
                    others.append((record, box))
                elif box.is_fraction and (problem := box.problem) is not None:
                    yield finding_at("box", source, record, f"{record.where}: {box.text} {problem}", record.image)
        yield from _other_units(source, others)


def _boxes(record: Record) -> Iterator[_Box]:
    for turn in record.turns:
        for match in _BOX.finditer(turn.text):
            yield _Box(match[0], tuple(float(number) for number in match.groups()))


def _other_units(source: Source, boxes: list[tuple[Record, _Box]]) -> Iterator[Finding]:
    """Yield one finding for all boxes of integers, if they are many enough to be boxes."""
    if len(boxes) < _MIN_OTHER_UNITS:
        return
    record, box = boxes[0]
    largest = max(max(box.values) for _, box in boxes)
    shown = (
        f"{counted(len(boxes), 'box', 'boxes')} up to {largest:g}, such as {box.text}: pixels, percent or thousandths"
    )
    yield Finding(
        "box", source.name, source.data_name, record.number, None, f"{record.where}: {shown}", count=len(boxes)
    )
