"""Read the rows of an .xlsx file with the standard library. Source of the form: ECMA-376, part 1, section 18."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, Any, NamedTuple
from xml.etree import ElementTree

from lora_llava.data.record import MAX_CHARACTERS
from lora_llava.data.sources.selection import Entry
from lora_llava.data.sources.tables import check_names
from lora_llava.errors import DataError
from lora_llava.system.text import counted, listed, printable

_MAX_BYTES, _MAX_RATIO = 2**30, 200
"""Most unpacked bytes of a part, and the most for a byte of the file: a sheet of equal rows has about 100."""
_MAX_COLUMNS = 16_384
_REFERENCE = re.compile(r"([A-Z]{1,3})(\d{1,7})")
_DATES = {*range(14, 23), 27, 30, 36, *range(45, 48), 50, 57}
"""Number formats built into Excel that show a date or a time."""
_DATE_LETTERS = re.compile(r'"[^"]*"|\\.|\[[^\]]*\]|_.')
"""Parts of a number format that are no letters of a date."""
_DAMAGED = (zipfile.BadZipFile, zlib.error, ElementTree.ParseError, LookupError, ValueError, EOFError, RuntimeError)
_NOT_A_WORKBOOK = "is no .xlsx workbook; save it in Excel or LibreOffice again, or as CSV (UTF-8)"


class _Book(NamedTuple):
    """What the sheets of a workbook share."""

    texts: list[str]
    is_date: list[bool]
    """By style: whether its numbers are dates."""
    epoch: datetime


def read_sheet(path: Path, sheet: str | None) -> Iterator[Entry]:
    """Yield the rows of a sheet (None: the first) as mappings by the names in its first row; an empty cell is None.

    Empty rows are passed over. Raises DataError if the file as a whole cannot be read.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"data file {path} is not a regular file; correct path")
    try:
        with zipfile.ZipFile(path) as archive:
            yield from _rows(archive, path, sheet)
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror}; correct path") from None
    except _DAMAGED:
        raise DataError(f"{path.name}: {_NOT_A_WORKBOOK}") from None


def _rows(archive: zipfile.ZipFile, path: Path, sheet: str | None) -> Iterator[Entry]:
    book, part = _open_book(archive, path, sheet)
    names: list[str] | None = None
    with _part(archive, part, path) as stream:
        for number, cells in _cells(stream, book, path):
            if isinstance(cells, DataError):
                yield Entry(None, number, cells)
                continue
            if not any(value is not None for value in cells.values()):
                continue
            if names is None:
                last = max(column for column, value in cells.items() if value is not None)
                names = [str(cells.get(column) or "").strip() for column in range(last + 1)]
                check_names([name for name in names if name], path)
                continue
            beyond = [column for column, value in cells.items() if value is not None and not _name(names, column)]
            if beyond:
                problem = f"a value in column {beyond[0] + 1}, which has no name in the first row; name it"
                yield Entry(None, number, DataError(f"{path.name}, line {number}: {problem}"))
                continue
            yield Entry({name: cells.get(column) for column, name in enumerate(names) if name}, number)
    if names is None:
        check_names([], path)


def _name(names: list[str], column: int) -> str:
    return names[column] if column < len(names) else ""


def _open_book(archive: zipfile.ZipFile, path: Path, sheet: str | None) -> tuple[_Book, str]:
    """Return what the sheets share, and the part of the archive that holds the sheet."""
    workbook = _tree(archive, "xl/workbook.xml", path)
    sheets = {str(item.get("name")): _relation(item) for item in _all(workbook, "sheet")}
    if not sheets or (sheet is not None and sheet not in sheets):
        shown = listed([printable(name, 40) for name in sheets])
        raise DataError(f"{path.name}: there is no sheet {sheet!r}; it has {shown or 'none'}; correct name")
    targets = {str(item.get("Id")): str(item.get("Target")) for item in _tree(archive, _RELATIONS, path)}
    target = targets[sheets[sheet if sheet is not None else next(iter(sheets))]]
    part = target.lstrip("/") if target.startswith("/") else f"xl/{target}"
    texts = []
    if "xl/sharedStrings.xml" in archive.namelist():
        texts = [_text(item) for item in _all(_tree(archive, "xl/sharedStrings.xml", path), "si")]
    uses_1904 = any(item.get("date1904") in ("1", "true") for item in _all(workbook, "workbookPr"))
    epoch = datetime(1904, 1, 1) if uses_1904 else datetime(1899, 12, 30)
    return _Book(texts, _date_styles(archive, path), epoch), part


_RELATIONS = "xl/_rels/workbook.xml.rels"


def _relation(item: ElementTree.Element) -> str:
    """Return the id of a sheet's relation, whose attribute has one of two namespaces."""
    return next(value for key, value in item.attrib.items() if key.endswith("}id"))


def _date_styles(archive: zipfile.ZipFile, path: Path) -> list[bool]:
    if "xl/styles.xml" not in archive.namelist():
        return []
    tree = _tree(archive, "xl/styles.xml", path)
    own = {str(item.get("numFmtId")): str(item.get("formatCode")) for item in _all(tree, "numFmt")}
    dates = {key for key, code in own.items() if re.search("[ymdhs]", _DATE_LETTERS.sub("", code).lower())}
    dates |= {str(number) for number in _DATES if str(number) not in own}
    return [item.get("numFmtId") in dates for cells in _all(tree, "cellXfs") for item in cells]


def _part(archive: zipfile.ZipFile, name: str, path: Path) -> IO[bytes]:
    """Open a part of the archive; DataError if it unpacks to far more than its size. Raises KeyError if it lacks it."""
    info = archive.getinfo(name)
    if info.file_size > _MAX_BYTES or info.file_size > max(2**20, _MAX_RATIO * info.compress_size):
        raise DataError(f"{path.name}: unpacks to {info.file_size:,} bytes, far more than its size; save it as CSV")
    return archive.open(info)


def _tree(archive: zipfile.ZipFile, name: str, path: Path) -> ElementTree.Element:
    with _part(archive, name, path) as stream:
        return ElementTree.parse(stream).getroot()  # noqa: S314 - expat bounds the growth by entities


def _all(tree: ElementTree.Element, tag: str) -> Iterator[ElementTree.Element]:
    """Yield the elements of a name in any namespace."""
    return (item for item in tree.iter() if _tag(item) == tag)


def _tag(item: ElementTree.Element) -> str:
    return item.tag.rpartition("}")[2]


def _text(item: ElementTree.Element) -> str:
    """Return the text of a string with its formatted runs, without the phonetic ones of Japanese."""
    parts = []
    for child in item:
        if _tag(child) == "t":
            parts.append(child.text or "")
        elif _tag(child) == "r":
            parts += [run.text or "" for run in child if _tag(run) == "t"]
    return re.sub(r"_x([0-9A-Fa-f]{4})_", lambda match: chr(int(match[1], 16)), "".join(parts))


def _cells(stream: IO[bytes], book: _Book, path: Path) -> Iterator[tuple[int, dict[int, Any] | DataError]]:
    """Yield the number of each row and its values by the index of their column, or why it cannot be read."""
    number = 0
    for _, row in ElementTree.iterparse(stream):  # noqa: S314
        if _tag(row) != "row":
            continue
        number = int(row.get("r") or number + 1)
        try:
            yield number, _values(row, book, f"{path.name}, line {number}")
        except DataError as error:
            yield number, error
        row.clear()


def _values(row: ElementTree.Element, book: _Book, where: str) -> dict[int, Any]:
    values: dict[int, Any] = {}
    column = -1
    for cell in row:
        if _tag(cell) == "c":
            column = _column(cell.get("r"), column + 1)
            values[column] = _value(cell, book, where)
    return values


def _column(reference: str | None, following: int) -> int:
    """Return the index of the column in a reference such as AB12."""
    if reference is None or (match := _REFERENCE.fullmatch(reference)) is None:
        return following
    index = 0
    for letter in match[1]:
        index = 26 * index + ord(letter) - ord("A") + 1
    if index > _MAX_COLUMNS:
        raise ValueError(reference)
    return index - 1


def _value(cell: ElementTree.Element, book: _Book, where: str) -> Any:
    kind = cell.get("t", "n")
    if kind == "inlineStr":
        return next((_text(item) for item in cell if _tag(item) == "is"), "").strip() or None
    raw = next((item.text for item in cell if _tag(item) == "v"), None)
    if raw is None or not raw.strip():
        return None
    if kind == "s":
        text = book.texts[int(raw)]
    elif kind == "str":
        text = raw
    elif kind == "b":
        return raw.strip() == "1"
    elif kind == "e":
        raise DataError(f"{where}: cell {cell.get('r')} holds the error {printable(raw, 20)}; correct its formula")
    elif kind == "d":
        return raw
    else:
        return _number(float(raw), cell.get("s"), book)
    if len(text) > MAX_CHARACTERS:
        raise DataError(f"{where}: cell {cell.get('r')} has {counted(len(text), 'character')}; shorten it")
    return text if text.strip() else None


def _number(number: float, style: str | None, book: _Book) -> Any:
    """Return a number, or a date as text in ISO's form."""
    index = int(style or 0)
    if index < len(book.is_date) and book.is_date[index] and 0 <= number < 3_000_000:
        moment = book.epoch + timedelta(days=number)
        if number < 1:
            return f"{moment:%H:%M:%S}"
        return f"{moment:%Y-%m-%d}" if number.is_integer() else f"{moment:%Y-%m-%d %H:%M:%S}"
    return int(number) if number.is_integer() and abs(number) < 2**53 else number
