"""Write answers as a table: CSV for spreadsheets, or JSON Lines."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_llava.errors import RecipeError
from lora_llava.system.files import json_text, new_file, refuse_existing

CSV, JSONL = ".csv", ".jsonl"
SKIPPED = ".skipped.jsonl"
"""What is appended to the name of an output, for the records that were left out."""
_FORMULA = re.compile("\\s*[=+\\-@\uff1d\uff0b\uff0d\uff20]")
"""Start of a text that a spreadsheet would compute; the last four are the full-width forms of the signs."""
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")


def refuse_output(path: Path, forms: Sequence[str], *others: Path) -> None:
    """Raise RecipeError for an output whose name says none of the `forms`, or which exists or cannot be created.

    `others`: files that are written with it.
    """
    if path.suffix.lower() not in forms:
        raise RecipeError(f"output {path}: its name must end in {' or '.join(forms)}")
    for file in (path, *others):
        refuse_existing(file, RecipeError)


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], last: Sequence[str] = ()) -> None:
    """Write rows to a new file: as CSV if `path` ends in .csv, else as JSON Lines in UTF-8.

    A CSV has the columns of all rows, those of `last` at the end, and opens in Excel: it is UTF-8 with a byte order
    mark, and text that Excel would compute as a formula gets an apostrophe in front.
    """
    with new_file(path) as temporary:
        if path.suffix.lower() == CSV:
            _write_csv(temporary, list(rows), last)
            return
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json_text(row, ensure_ascii=False) + "\n" for row in rows)


def _write_csv(path: Path, rows: list[Mapping[str, Any]], last: Sequence[str]) -> None:
    columns = [*dict.fromkeys(key for row in rows for key in row if key not in last), *last]
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([_harmless(column) for column in columns])
        writer.writerows([[_cell(row.get(column)) for column in columns] for row in rows])


def _cell(value: Any) -> Any:
    """Return a value as a cell: text without formulas, nothing for None, true or false, lists as JSON."""
    if isinstance(value, str):
        return _harmless(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def _harmless(text: str) -> str:
    """Return `text`, with an apostrophe in front if a spreadsheet would compute it; a number stays one."""
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text
