"""Read the rows of an .xlsx file with openpyxl, which is imported only when a sheet is read."""

from __future__ import annotations

import itertools
import warnings
import zipfile
from collections.abc import Iterator
from datetime import date, time, timedelta
from pathlib import Path
from typing import IO, Any, NamedTuple

from lora_llava.data.record import MAX_CHARACTERS
from lora_llava.data.sources.selection import Entry
from lora_llava.data.sources.tables import check_names
from lora_llava.errors import DataError
from lora_llava.system.text import counted, listed, printable

_MAX_BYTES, _MAX_RATIO = 2**30, 200
"""Most unpacked bytes of a part, and the most for a byte of the file: a sheet of equal rows has about 100."""
_MAX_ROWS, _MAX_COLUMNS = 2**20, 2**14
"""Limits of Excel."""
_MAX_CELLS, _MAX_STRINGS = 2**24, 2**22
"""What is read of a sheet, and texts of a workbook; a million cells take about five seconds."""
_MAX_ELEMENTS = 2**17
"""Elements of XML in a row or a text, and before the first: a cell of Excel has at most about eight."""
_MAX_TAGS = 2**19
"""Tags of a part that describes others; a workbook with all styles that Excel allows has about 200,000."""
_EAST_ASIAN_DATES = {*range(27, 37), *range(50, 59)}
"""Number formats built into Excel that openpyxl does not take for dates."""


class _Row(NamedTuple):
    """A row with the cells that it has."""

    number: int
    cells: list[dict[str, Any]]
    """As openpyxl parses them, with `column` from 1."""
    book: Any
    """The workbook."""

    def format_of(self, cell: dict[str, Any]) -> int:
        """Return the number of a cell's number format."""
        return int(self.book._cell_styles[cell["style_id"]].numFmtId)


def read_sheet(path: Path, sheet: str | None) -> Iterator[Entry]:
    """Yield the rows of a sheet (None: the first) as mappings by the names in its first row; an empty cell is None.

    Empty rows are passed over. Raises DataError if the file as a whole cannot be read.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"data file {path} is not a regular file; correct path")
    try:
        with path.open("rb") as file:
            yield from _entries(_rows(file, path, sheet), path)
    except (DataError, ImportError):
        raise
    except Exception as error:  # noqa: BLE001 - openpyxl raises anything for a damaged file
        if isinstance(error, OSError) and error.strerror:
            raise DataError(f"data file {path} cannot be read: {error.strerror}; correct path") from None
        hint = "save it in Excel or LibreOffice again, or as CSV (UTF-8)"
        raise DataError(f"{path.name}: is no .xlsx workbook; {hint}") from None


def _rows(file: IO[bytes], path: Path, sheet: str | None) -> Iterator[_Row]:
    """Yield the rows that have a cell, in the order of the file. Raises anything for a damaged file."""
    with zipfile.ZipFile(file) as archive:
        _check_parts(archive, path)
    with warnings.catch_warnings(action="ignore"):
        from openpyxl.reader.excel import ExcelReader
        from openpyxl.styles.stylesheet import apply_stylesheet

        # Of load_workbook only what cells depend on. The names of ranges and the dimensions in a file, which may be
        # wrong, are matched in time quadratic in their length.
        reader = ExcelReader(file, read_only=True, data_only=True, keep_links=False)
        reader.read_manifest()
        reader.shared_strings = _strings(reader, path)
        reader.read_workbook()
        apply_stylesheet(reader.archive, reader.wb)
        part = _part_of(reader, path, sheet)
    with reader.archive.open(part) as source:
        rows = _parsed_rows(source, reader, path)
        num_rows = num_cells = 0
        while True:
            with warnings.catch_warnings(action="ignore"):  # never around a `yield`, which runs code of the caller
                batch = list(itertools.islice(rows, 100))
            if not batch:
                return
            num_rows += len(batch)
            num_cells += sum(len(row.cells) for row in batch)
            if num_rows > _MAX_ROWS or num_cells > _MAX_CELLS:
                raise DataError(
                    f"{path.name}: has more than {_MAX_ROWS:,} rows or {_MAX_CELLS:,} cells; save it as CSV"
                )
            yield from (row for row in batch if row.cells)


def _check_parts(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise DataError for a part that is far larger than its share of the file, or than its use allows."""
    for part in archive.infolist():
        if part.file_size > min(_MAX_BYTES, max(2**20, _MAX_RATIO * part.compress_size)):
            raise DataError(f"{path.name}: unpacks to {part.file_size:,} bytes, far more than its size; save it as CSV")
        is_description = part.filename.endswith((".rels", "styles.xml", "workbook.xml", "[Content_Types].xml"))
        if is_description and archive.read(part).count(b"<") > _MAX_TAGS:
            raise DataError(f"{path.name}: {part.filename} has more than {_MAX_TAGS:,} tags; save it as CSV")


def _parsed_rows(source: IO[bytes], reader: Any, path: Path) -> Iterator[_Row]:
    """Yield all rows of a sheet, also those whose number does not rise; openpyxl drops them and fills gaps."""
    from openpyxl.worksheet._reader import ROW_TAG, WorkSheetParser

    book = reader.wb
    parser = WorkSheetParser(
        source,
        reader.shared_strings,
        data_only=True,
        epoch=book.epoch,
        date_formats=book._date_formats,
        timedelta_formats=book._timedelta_formats,
    )
    for element in _elements(source, ROW_TAG, path):
        number, cells = parser.parse_row(element)
        parser.row_dimensions.clear()
        if number > _MAX_ROWS or any(cell["column"] > _MAX_COLUMNS for cell in cells):
            raise ValueError(number)
        yield _Row(number, cells, book)


def _strings(reader: Any, path: Path) -> list[str]:
    """Return the texts that cells refer to by their index."""
    from openpyxl.cell.text import Text
    from openpyxl.xml.constants import SHARED_STRINGS, SHEET_MAIN_NS

    strings: list[str] = []
    if (part := reader.package.find(SHARED_STRINGS)) is not None:
        with reader.archive.open(part.PartName[1:]) as source:
            for element in _elements(source, f"{{{SHEET_MAIN_NS}}}si", path):
                if len(strings) == _MAX_STRINGS:
                    raise DataError(f"{path.name}: has more than {_MAX_STRINGS:,} different texts; save it as CSV")
                # As openpyxl's read_string_table, which has no bound.
                strings.append(Text.from_tree(element).content.replace("x005F_", ""))
    return strings


def _elements(source: IO[bytes], tag: str, path: Path) -> Iterator[Any]:
    """Yield the elements with a tag, each valid until the next one. Raises DataError if one is far too large."""
    from openpyxl.xml.functions import iterparse

    size = 0
    for _, element in iterparse(source):
        if element.tag.endswith("}sheetData"):
            # What follows, such as merged ranges, says nothing about values.
            return
        size += 1
        if size > _MAX_ELEMENTS:
            raise DataError(f"{path.name}: a row or text has more than {_MAX_ELEMENTS:,} parts; save it as CSV")
        if element.tag == tag:
            yield element
            element.clear()
            size = 0


def _part_of(reader: Any, path: Path, sheet: str | None) -> str:
    """Return the name of the part with a sheet (None: the first)."""
    sheets = [(item, relation) for item, relation in reader.parser.find_sheets() if "chartsheet" not in relation.Type]
    parts = {str(item.name): str(relation.target) for item, relation in sheets if relation.target in reader.valid_files}
    if sheet is not None and sheet not in parts:
        shown = listed([printable(name, 40) for name in parts])
        raise DataError(f"{path.name}: there is no sheet {sheet!r}; it has {shown or 'none'}; correct name")
    return parts[sheet] if sheet is not None else next(iter(parts.values()))


def _entries(rows: Iterator[_Row], path: Path) -> Iterator[Entry]:
    names: dict[int, str] = {}
    for row in rows:
        where = f"{path.name}, line {row.number}"
        try:
            cells = ((cell["column"], _value(cell, row, where)) for cell in row.cells)
            values = {column: value for column, value in cells if value is not None}
            if names and (beyond := values.keys() - names.keys()):
                problem = f"a value in column {min(beyond)}, which has no name in the first row"
                raise DataError(f"{where}: {problem}; name it, or remove the rows above the names")
        except DataError as error:
            yield Entry(None, row.number, error)
            continue
        if names and values:
            yield Entry({name: values.get(column) for column, name in names.items()}, row.number)
        elif values:
            names = {column: name for column, value in values.items() if (name := str(value or "").strip())}
            check_names(list(names.values()), path)
    if not names:
        check_names([], path)


def _value(cell: dict[str, Any], row: _Row, where: str) -> Any:
    """Return the value of a cell: a date or a time as text in ISO's form, a whole number as int."""
    from openpyxl.utils import get_column_letter
    from openpyxl.utils.datetime import from_excel
    from openpyxl.utils.escape import unescape

    value = cell["value"]
    if value is None or isinstance(value, bool):
        return value
    name = f"{get_column_letter(cell['column'])}{row.number}"
    if cell["data_type"] == "e":
        raise DataError(f"{where}: cell {name} holds the error {printable(value, 20)}; correct its formula")
    if isinstance(value, str):
        if len(value) > MAX_CHARACTERS:
            raise DataError(f"{where}: cell {name} has {counted(len(value), 'character')}; shorten it")
        return unescape(value) if value.strip() else None
    if cell["data_type"] == "n" and row.format_of(cell) in _EAST_ASIAN_DATES and 0 <= value < 2_900_000:
        value = from_excel(value, row.book.epoch)
    if isinstance(value, timedelta):
        minutes, seconds = divmod(int(value.total_seconds()), 60)
        return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"
    if isinstance(value, (date, time)):
        return str(value).partition(".")[0].removesuffix(" 00:00:00")
    number = float(value)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number
