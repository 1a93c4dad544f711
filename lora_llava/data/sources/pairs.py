"""Read preference pairs from columns: a question with a better (`chosen`) and a worse (`rejected`) answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from lora_llava.conversation.encode import Turn
from lora_llava.data.sources.cells import kind_of, read_answer, read_question
from lora_llava.errors import DataError
from lora_llava.recipe.columns import ColumnSettings

_KEYS = ("question", "chosen", "rejected")


class Pair(NamedTuple):
    """A question answered by the chosen answer, and the rejected one."""

    turns: list[Turn]
    rejected: str


def read_pair(row: Mapping[str, Any], columns: ColumnSettings, where: str) -> Pair:
    """Read question, chosen and rejected answer from the columns that the settings name.

    If one column is named for all three, it holds them as a JSON object in text, as in RLHF-V. Raises DataError for
    anything that is not text.
    """
    names = {key: str(getattr(columns, key)) for key in _KEYS}
    if len(set(names.values())) == 1:
        location = f"{where}: {columns.question}"
        row = _object_in(row.get(names["question"]), location)
        names, where = {key: key for key in _KEYS}, location
    question = read_question(row.get(names["question"]), f"{where}: {names['question']}")
    chosen, rejected = (read_answer(row.get(names[key]), f"{where}: {names[key]}").text for key in _KEYS[1:])
    return Pair([Turn("user", question), Turn("assistant", chosen)], rejected)


def _object_in(text: Any, location: str) -> dict[str, Any]:
    """Parse the JSON object in a text."""
    try:
        value = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise DataError(
            f"{location}: is {kind_of(text)}, must be a JSON object with {', '.join(_KEYS)}, since all three name this "
            "column; give each its own column, or correct it"
        )
    return value
