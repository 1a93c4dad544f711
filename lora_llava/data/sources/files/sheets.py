"""Read the rows of an .xlsx file with openpyxl, which is imported only when a sheet is read."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator
from datetime import date, time, timedelta
from itertools import islice
from pathlib import Path
from typing import IO, Any

from lora_llava.data.record import MAX_CHARACTERS
from lora_llava.data.sources.selection import Entry
from lora_llava.data.sources.tables import check_names
from lora_llava.errors import DataError
from lora_llava.system.text import counted, listed, printable

_MAX_BYTES, _MAX_RATIO = 2**30, 200
"""Most unpacked bytes of a part, and the most for a byte of the file: a sheet of equal rows has about 100."""
_MAX_ROWS, _MAX_COLUMNS = 2**20, 2**14
"""Limits of Excel."""
_EAST_ASIAN_DATES = {*range(27, 37), *range(50, 59)}
"""Number formats built into Excel that openpyxl does not take for dates."""


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


def _rows(file: IO[bytes], path: Path, sheet: str | None) -> Iterator[tuple[int, Any]]:
    """Yield the number and the cells of each row that has any. Raises anything for a damaged file."""
    for part in zipfile.ZipFile(file).infolist():
        if part.file_size > min(_MAX_BYTES, max(2**20, _MAX_RATIO * part.compress_size)):
            raise DataError(f"{path.name}: unpacks to {part.file_size:,} bytes, far more than its size; save it as CSV")
    with warnings.catch_warnings(action="ignore"):
        from openpyxl.reader.excel import ExcelReader
        from openpyxl.styles.stylesheet import apply_stylesheet

        # The steps of load_workbook without the names of ranges, whose pattern takes time quadratic in their length.
        reader = ExcelReader(file, read_only=True, data_only=True, keep_links=False)
        reader.read_manifest()
        reader.read_strings()
        reader.read_workbook()
        apply_stylesheet(reader.archive, reader.wb)
        reader.read_worksheets()
    sheets = {str(item.title): item for item in reader.wb.worksheets}
    if sheet is not None and sheet not in sheets:
        shown = listed([printable(name, 40) for name in sheets])
        raise DataError(f"{path.name}: there is no sheet {sheet!r}; it has {shown or 'none'}; correct name")
    worksheet = sheets[sheet] if sheet is not None else reader.wb.worksheets[0]
    # The dimensions in the file may be wrong. openpyxl fills the gap up to any row number: max_row bounds it.
    worksheet.reset_dimensions()
    rows = enumerate(worksheet.iter_rows(max_row=_MAX_ROWS + 1), start=1)
    while True:
        with warnings.catch_warnings(action="ignore"):  # never around a `yield`, which runs code of the caller
            batch = list(islice(rows, 100))
        if not batch:
            return
        for number, row in batch:
            if number > _MAX_ROWS or len(row) > _MAX_COLUMNS:
                raise ValueError(number)
            if row:
                yield number, row


def _entries(rows: Iterator[tuple[int, Any]], path: Path) -> Iterator[Entry]:
    names: dict[int, str] = {}
    for number, row in rows:
        where = f"{path.name}, line {number}"
        try:
            cells = ((column, _value(cell, where)) for column, cell in enumerate(row))
            values = {column: value for column, value in cells if value is not None}
            if names and (beyond := values.keys() - names.keys()):
                problem = f"a value in column {min(beyond) + 1}, which has no name in the first row"
                raise DataError(f"{where}: {problem}; name it")
        except DataError as error:
            yield Entry(None, number, error)
            continue
        if names and values:
            yield Entry({name: values.get(column) for column, name in names.items()}, number)
        elif values:
            names = {column: name for column, value in values.items() if (name := str(value or "").strip())}
            check_names(list(names.values()), path)
    if not names:
        check_names([], path)


def _value(cell: Any, where: str) -> Any:
    """Return the value of a cell: a date or a time as text in ISO's form, a whole number as int."""
    from openpyxl.utils.datetime import from_excel
    from openpyxl.utils.escape import unescape

    value = cell.value
    if value is None or isinstance(value, bool):
        return value
    if cell.data_type == "e":
        raise DataError(f"{where}: cell {cell.coordinate} holds the error {printable(value, 20)}; correct its formula")
    if isinstance(value, str):
        if len(value) > MAX_CHARACTERS:
            raise DataError(f"{where}: cell {cell.coordinate} has {counted(len(value), 'character')}; shorten it")
        return unescape(value) if value.strip() else None
    if cell.data_type == "n" and cell.style_array.numFmtId in _EAST_ASIAN_DATES and 0 <= value < 2_900_000:
        value = from_excel(value, cell.parent.parent.epoch)
    if isinstance(value, timedelta):
        minutes, seconds = divmod(int(value.total_seconds()), 60)
        return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"
    if isinstance(value, (date, time)):
        return str(value).partition(".")[0].removesuffix(" 00:00:00")
    number = float(value)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number
