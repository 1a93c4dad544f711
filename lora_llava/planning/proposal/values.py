"""Infer what the columns of a table hold from their values, where their names do not say it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lora_llava.data.images.root import IMAGE_SUFFIXES

_IMAGES = (*IMAGE_SUFFIXES, ".dcm")
_QUESTION_MARKS = ("?", "\uff1f", "\u061f")
"""As in Latin, Chinese and Arabic text."""
_SHARE = 0.5
"""Share of the values of a column that must look like images or questions."""
_UNKNOWN = "COLUMN"


def columns_option(rows: Sequence[Mapping[str, Any]], names: Collection[str], others: Collection[str]) -> str:
    """Return the option `--columns` that reads a table, with COLUMN where the values do not tell; empty if none does.

    `others`: columns that hold neither questions nor answers, such as those of patients.
    """
    # A name with one of these would need the form of a mapping.
    texts = {name: _texts(rows, name) for name in names if name not in others and not re.search(r"[,={}]", name)}
    image = _column(texts, _IMAGES)
    rest = {name: values for name, values in texts.items() if name != image and values}
    question = _column(rest, _QUESTION_MARKS)
    answers = [name for name in rest if name != question]
    answer = answers[0] if len(answers) == 1 and question is not None else None
    if image is None and question is None:
        return ""
    parts = {"image": image, "question": question, "answer": answer}
    return "--columns " + shlex.quote(",".join(f"{kind}={name or _UNKNOWN}" for kind, name in parts.items()))


def image_columns(rows: Sequence[Mapping[str, Any]], names: Collection[str]) -> list[str]:
    """Return the columns of which most values end like names of images."""
    return [name for name in names if _share(_texts(rows, name), _IMAGES) > _SHARE]


def _texts(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    return [value.strip() for row in rows if isinstance(value := row.get(name), str) and value.strip()]


def _column(texts: Mapping[str, Sequence[str]], endings: tuple[str, ...]) -> str | None:
    """Return the column of which most values end like this; None if fewer than half of any column do."""
    shares = {name: _share(values, endings) for name, values in texts.items()}
    best = max(shares, key=lambda name: shares[name], default=None)
    return best if best is not None and shares[best] > _SHARE else None


def _share(values: Sequence[str], endings: tuple[str, ...]) -> float:
    return sum(value.lower().endswith(endings) for value in values) / max(len(values), 1)
