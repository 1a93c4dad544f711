"""Read the raw entries of a file: JSON, JSON Lines, CSV and TSV."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_llava.data.bad_records import BadRecords, Exclusions
from lora_llava.data.record import MAX_CHARACTERS, Record
from lora_llava.data.sources.files.encodings import declaring, decode, to_utf_8
from lora_llava.data.sources.forms import describe_object
from lora_llava.data.sources.selection import Entry, Where, exploded, records_in
from lora_llava.errors import DataError
from lora_llava.recipe.fields import data_name
from lora_llava.recipe.stages import DataSettings
from lora_llava.system.text import counted, printable

JSON_SUFFIXES = (".json", ".jsonl")
TABLE_SUFFIXES = (".csv", ".tsv", ".xlsx")
_DELIMITERS = ",;\t|"
_BOM = "\ufeff"


def read_records(
    entries: Iterable[Entry],
    read: Callable[[Entry, int], Record],
    data: DataSettings,
    bad: BadRecords,
    identity: Callable[[Any], str | None] = lambda _: None,
) -> list[Record]:
    """Read the first `data.max_records` entries, except those in `data.exclude` and those that `bad` collects.

    With `data.each`, an entry is read for every element of a list; with `data.where`, only entries that meet it are.
    `read` gets an entry and its number, counted from 1 over all of them; `identity` returns the id in an entry's value.
    Raises DataError if no entry meets `where`.
    """
    excluded = Exclusions(data.exclude)
    records: list[Record] = []
    number = taken = 0
    filters = None if data.where is None else Where(data.where, data_name(data.path))
    for entry in entries if data.each is None else exploded(entries, data.each, data_name(data.path)):
        if taken == data.max_records:
            break
        number += 1
        if filters is not None and entry.error is None and not filters.met_by(entry.value):
            continue
        taken += 1
        known = None if entry.error is not None else identity(entry.value)
        if excluded.holds(number, known):
            continue
        try:
            if entry.error is not None:
                raise entry.error
            records.append(read(entry, number))
        except DataError as error:
            bad.add(number, known, error)
    if filters is not None and not taken:
        raise filters.leave_nothing(number)
    excluded.check(number if data.max_records is None else max(number, *excluded.ids, 0))
    return records


def read_entries(path: Path, records: str | None, encoding: str | None) -> Iterator[Entry]:
    """Yield the entries of a .json or .jsonl file; DataError if the file as a whole cannot be read.

    `records`: dotted path to the list of entries in a .json file; `encoding`: None means UTF-8, or UTF-16 if marked.
    """
    raw = to_utf_8(_read(path), encoding, path.name)
    if path.suffix == ".jsonl":
        for number, line in enumerate(raw.split(b"\n"), start=1):
            if line.strip():
                try:
                    yield Entry(_parse(line, f"{path.name}, line {number}", lines=True), number)
                except DataError as error:
                    yield Entry(None, number, error)
        return
    content = _parse(raw, path.name, lines=False)
    hint = describe_object(content) if isinstance(content, dict) else "wrap it in [ ]"
    for entry in records_in(content, records, path.name, hint):
        yield Entry(entry, None)


def read_document(path: Path) -> Any:
    """Return the whole content of a JSON file; DataError if it cannot be read."""
    return _parse(to_utf_8(_read(path), None, path.name), path.name, lines=False)


def read_rows(path: Path, encoding: str | None = None) -> Iterator[Entry]:
    """Yield the rows of a .csv or .tsv file as mappings by the names in its first line; an empty cell is None.

    A column without a name, such as that of pandas' index, is called `column N`, counted from 1.

    The delimiter is the one that splits the first line into the most names. Raises DataError if the file as a whole
    cannot be read.
    """
    text = decode(_read(path), encoding, path.name)
    if text.startswith("sep=") and text[5:6] in ("\r", "\n"):
        # Excel's own line about the delimiter.
        delimiter, text = text[4], text[5:].lstrip("\r\n")
    else:
        first = re.split("[\r\n]", text, maxsplit=1)[0]
        delimiter = "\t" if path.suffix == ".tsv" else max(_DELIMITERS, key=lambda mark: len(_header(first, mark)))
    csv.field_size_limit(MAX_CHARACTERS)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        first_row = [name.strip() for name in next(reader, [])]
        names = [name or f"column {number}" for number, name in enumerate(first_row, start=1)]
        check_names(names if any(first_row) else [], path)
        for row in reader:
            if row:
                yield _row(row, names, path, reader.line_num)
    except csv.Error as error:
        raise DataError(f"{path.name}, line {reader.line_num}: not a table: {error}; correct its quotes") from None


def _header(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter), [])


def check_names(names: list[str], path: Path) -> None:
    """Raise DataError unless there are names of columns, each once, in the right encoding."""
    if not names:
        raise DataError(f"{path.name}: is empty, must begin with a line of column names")
    if any("\0" in name for name in names):
        encoding = "utf-16-be" if names[0].startswith("\0") else "utf-16-le"
        raise DataError(
            f"{path.name}: its first line holds NUL characters, as UTF-16 without its mark does; {declaring(encoding)}"
        )
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{path.name}: column {printable(duplicate)!r} occurs twice in its first line; rename one")


def _row(row: list[str], names: list[str], path: Path, line: int) -> Entry:
    if len(row) != len(names):
        problem = (
            f"has {counted(len(row), 'field')}, the first line has {len(names)}; quote texts that hold a delimiter"
        )
        return Entry(None, line, DataError(f"{path.name}, line {line}: {problem}"))
    return Entry({name: value if value.strip() else None for name, value in zip(names, row, strict=True)}, line)


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise DataError(f"data file {path} is not a regular file; correct path")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror}; correct path") from None


def _parse(raw: bytes, location: str, *, lines: bool) -> Any:
    try:
        text = raw.decode("utf-8")
        if text.startswith(_BOM):
            raise _NotJsonError("it begins with a byte order mark; save it as UTF-8 without")
        return _DECODER.decode(text)
    except _NotJsonError as error:
        raise DataError(f"{location}: not valid JSON: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{location}: not UTF-8 at byte {error.start + 1}; {declaring('cp1252')}") from None
    except json.JSONDecodeError as error:
        spot = f"column {error.colno}" if lines else f"line {error.lineno}, column {error.colno}"
        hint = "; for one record a line, name the file .jsonl" if error.msg == "Extra data" and not lines else ""
        raise DataError(f"{location}{', ' if lines else ': '}{spot}: not valid JSON: {error.msg}{hint}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{location}: not valid JSON: a number too long, or nested too deeply; correct it") from None


class _NotJsonError(Exception):
    """Python's parser accepts it, but it is not JSON."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build the mapping of an object; unlike Python's parser, refuse duplicate keys instead of keeping the last."""
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _NotJsonError(f"key {duplicate!r:.80} occurs twice in one object; remove one")
    return members


def _no_number(word: str) -> None:
    raise _NotJsonError(f"{word} is not a number of JSON; write null, or a number")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_number)
"""One for all lines: making it takes as long as parsing a record."""
