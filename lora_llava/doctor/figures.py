"""Counts and histograms: lengths, turns, answers, image sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lora_llava.doctor.conversations import Conversations
from lora_llava.doctor.survey import Side, Survey
from lora_llava.system.text import printable

_MAX_ANSWERS = 12
_BINS = 12
_ROUND = (1, 2, 5)

_Histogram = list[dict[str, Any]]
"""Bars in order, each with `label` and `count`."""


def side_figures(survey: Survey, side: Side, conversations: Conversations) -> dict[str, Any]:
    """Return the counts of one side of the data."""
    records, sizes = conversations.records[side.name], conversations.sizes[side.name]
    images = {record.image.identity: survey.facts(record.image) for record in side.records if record.image}
    answers = Counter(turn.text.strip() for record in side.records for turn in record.turns[1::2])
    return {
        "records": len(side.records),
        "images": len(images),
        "records_without_image": sum(record.image is None for record in side.records),
        "questions": sum(len(record.turns) // 2 for record in side.records),
        "different_answers": len(answers),
        "turns": _histogram([len(record.turns) // 2 for record in records]),
        "answers": [
            {"label": printable(text, 40), "count": count} for text, count in answers.most_common(_MAX_ANSWERS)
        ],
        "image_width": _histogram([facts.width for facts in images.values()]),
        "image_height": _histogram([facts.height for facts in images.values()]),
        "tokens": _histogram([size.length for size in sizes]),
        "supervised_tokens": _histogram([size.num_supervised for size in sizes]),
        "total_tokens": sum(size.length for size in sizes),
    }


def _histogram(values: Sequence[int]) -> _Histogram:
    """Return a histogram of at most `_BINS` bins of equal, round width."""
    if not values:
        return []
    low, high = min(values), max(values)
    width = next(
        step * 10**power
        for power in range(12)
        for step in _ROUND
        if (high // (step * 10**power)) - (low // (step * 10**power)) < _BINS
    )
    counts = Counter(value // width for value in values)
    return [
        {
            "label": f"{bin_ * width:,}" if width == 1 else f"{bin_ * width:,} to {(bin_ + 1) * width - 1:,}",
            "count": counts[bin_],
        }
        for bin_ in range(low // width, high // width + 1)
    ]
