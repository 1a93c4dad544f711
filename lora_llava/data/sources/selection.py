"""Choose records: those of a list in the file (`records`), one for each element (`each`), those that meet `where`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lora_llava.data.sources.cells import as_text, kind_of
from lora_llava.data.sources.mapping import value_of
from lora_llava.errors import DataError
from lora_llava.recipe.columns import Condition
from lora_llava.system.text import counted, listed, printable

_MAX_SEEN = 20
"""Maximum values of a column that a message about `where` shows."""


class Entry(NamedTuple):
    """One entry of a file: its content, or why it cannot be read."""

    value: Any
    line: int | None
    """Its line number, if each record is a line."""
    error: DataError | None = None
    part: str = ""
    """Which element of a list in the file's entry it is, such as `entry 3, qas[2]`."""

    @property
    def spot(self) -> str:
        """Line and part, for messages; empty if neither is known."""
        return ", ".join(text for text in ("" if self.line is None else f"line {self.line}", self.part) if text)


class Where:
    """The conditions of `where`."""

    def __init__(self, conditions: Mapping[str, Condition], name: str) -> None:
        self.name = name
        self.accepted = {
            column: frozenset(map(_text_of, values if isinstance(values, list) else [values]))
            for column, values in conditions.items()
        }
        self._seen: dict[str, dict[str | None, None]] = {column: {} for column in conditions}
        self._columns: list[str] = []

    def met_by(self, row: Any) -> bool:
        """Return whether a row meets all conditions; a row that is no object does, to be refused by its reader."""
        if not isinstance(row, Mapping):
            return True
        met = True
        for column, accepted in self.accepted.items():
            text = _text_of(value_of(row, column))
            if len(seen := self._seen[column]) < _MAX_SEEN:
                seen[text] = None
            met = met and text in accepted
        if not met and not self._columns:
            self._columns = [printable(str(key), 40) for key in row]
        return met

    def leave_nothing(self, total: int) -> DataError:
        """Return the error for conditions that no entry meets: it shows the values that the columns have."""
        parts = []
        for column, seen in self._seen.items():
            if list(seen) in ([None], []):
                parts.append(f"there is no {printable(column)!r}; it has {listed(self._columns, _MAX_SEEN)}")
            elif not self.accepted[column] & seen.keys():
                shown = ["nothing" if text is None else printable(text, 40) for text in seen]
                parts.append(f"{printable(column)!r} has {listed(shown, _MAX_SEEN)}")
        why = "; ".join(parts) or "no record meets all of its conditions"
        return DataError(f"{self.name}: where: leaves none of {counted(total, 'record')}: {why}. Correct where")


def _text_of(value: Any) -> str | None:
    """Return a value as `where` compares it: as text, booleans in lower case; None if it is empty."""
    if isinstance(value, str):
        text = value.strip()
        return text.lower() if text.lower() in ("true", "false") else text or None
    if isinstance(value, bool | int | float) and value == value:
        return as_text(value, "")
    return None if value is None or value != value else str(value)


def exploded(entries: Iterable[Entry], each: str | Sequence[str], name: str) -> Iterator[Entry]:
    """Yield an entry for every element of a list in each entry, with the keys of both."""
    columns = [each] if isinstance(each, str) else list(each)
    for number, entry in enumerate(entries, start=1):
        if entry.error is not None or not isinstance(entry.value, Mapping):
            yield entry
            continue
        try:
            elements = list(_side_by_side(entry.value, columns))
        except DataError as error:
            line = "" if entry.line is None else f" (line {entry.line})"
            yield Entry(entry.value, entry.line, DataError(f"{name}, entry {number}{line}: {error}"))
            continue
        own = {key: value for key, value in entry.value.items() if key not in columns}
        for index, element in enumerate(elements):
            yield Entry({**own, **element}, entry.line, None, f"entry {number}, {printable(columns[0])}[{index}]")


def _side_by_side(row: Mapping[str, Any], columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the elements of lists of one length; an element that is no object has the name of its column."""
    lists = []
    for column in columns:
        value = value_of(row, column)
        if not isinstance(value, list):
            raise DataError(f"{printable(column)}: is {kind_of(value)}, must be a list, since each names it")
        lists.append(value)
    lengths = {column: len(values) for column, values in zip(columns, lists, strict=True)}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{printable(column)} has {length}" for column, length in lengths.items())
        raise DataError(f"each: the lists differ in length: {shown}; correct them")
    for values in zip(*lists, strict=True):
        merged: dict[str, Any] = {}
        for column, value in zip(columns, values, strict=True):
            merged.update(value if isinstance(value, dict) else {column: value})
        yield merged


def records_in(content: Any, path: str | None, name: str, hint: str) -> Iterable[Any]:
    """Return the records of a JSON file: a list, or a mapping, whose keys become the records' `id`.

    `path` leads to them from the top level. Raises DataError with `hint` if they are not there.
    """
    where = name
    if path is not None:
        where = f"{name}: records: {printable(path)!r}"
        content, at_the_top = (value_of(content, path) if isinstance(content, Mapping) else None), content
        if content is None:
            keys = [printable(str(key), 40) for key in at_the_top] if isinstance(at_the_top, Mapping) else []
            has = f"the top level has {listed(keys, _MAX_SEEN)}" if keys else f"the file holds {kind_of(at_the_top)}"
            raise DataError(f"{where} is not there; {has}; correct records")
    if isinstance(content, list):
        return content
    if isinstance(content, Mapping) and content and all(isinstance(value, Mapping) for value in content.values()):
        return ({"id": key, **value} for key, value in content.items())
    raise DataError(f"{where}: holds {kind_of(content)}, must hold a list of records; {hint}")
