"""Writes .xlsx files as Excel does: shared strings, styles of dates, relations between the parts."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

_MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006/relationships"
_TYPES = "http://schemas.openxmlformats.org/package/2006/content-types"
_SHEET_TYPE = "application/vnd.openxmlformats-officedocument.spreadsheetml"
STYLES = {"date": 1, "own date": 2, "percent": 3, "duration": 4, "Chinese date": 5}
"""Styles of a cell, which is then a tuple of number and style."""


def write_workbook(path: Path, sheets: Mapping[str, Sequence[Sequence[Any]]], workbook: str = "") -> Path:
    """Write rows of None, text, numbers, booleans, (number, style) or raw XML of a cell in a list."""
    texts: dict[str, int] = {}
    parts = {
        f"xl/worksheets/sheet{number}.xml": _sheet(rows, texts) for number, rows in enumerate(sheets.values(), start=1)
    }
    listed = "".join(
        f'<sheet name="{escape(name)}" sheetId="{number}" r:id="rId{number}"/>'
        for number, name in enumerate(sheets, start=1)
    )
    relations = "".join(
        f'<Relationship Id="rId{number}" Type="{_OFFICE}/worksheet" Target="worksheets/sheet{number}.xml"/>'
        for number in range(1, len(sheets) + 1)
    )
    types = "".join(
        f'<Override PartName="/xl/{name}.xml" ContentType="{_SHEET_TYPE}.{kind}+xml"/>'
        for name, kind in {"workbook": "sheet.main", "sharedStrings": "sharedStrings", "styles": "styles"}.items()
    )
    parts |= {
        "[Content_Types].xml": f'<Types xmlns="{_TYPES}">{types}</Types>',
        "xl/workbook.xml": f'<workbook xmlns="{_MAIN}" xmlns:r="{_OFFICE}">{workbook}'
        f"<sheets>{listed}</sheets></workbook>",
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{_PACKAGE}">{relations}</Relationships>',
        "xl/sharedStrings.xml": f'<sst xmlns="{_MAIN}">'
        + "".join(f'<si><t xml:space="preserve">{escape(text)}</t></si>' for text in texts)
        + "</sst>",
        "xl/styles.xml": f'<styleSheet xmlns="{_MAIN}"><numFmts count="2">'
        '<numFmt numFmtId="164" formatCode="[$-407]dd&quot;.&quot;mm&quot;.&quot;yyyy"/>'
        '<numFmt numFmtId="165" formatCode="0.0&quot; mm day&quot;"/></numFmts>'
        '<cellXfs><xf numFmtId="0"/><xf numFmtId="14"/><xf numFmtId="164"/><xf numFmtId="165"/>'
        '<xf numFmtId="46"/><xf numFmtId="31"/></cellXfs></styleSheet>',
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, f'<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n{content}')
    return path


def _sheet(rows: Sequence[Sequence[Any]], texts: dict[str, int]) -> str:
    lines = []
    for number, row in enumerate(rows, start=1):
        cells = "".join(_cell(f"{chr(65 + index)}{number}", value, texts) for index, value in enumerate(row))
        lines.append(f'<row r="{number}">{cells}</row>')
    return f'<worksheet xmlns="{_MAIN}"><sheetData>{"".join(lines)}</sheetData></worksheet>'


def _cell(reference: str, value: Any, texts: dict[str, int]) -> str:
    match value:
        case None:
            return ""
        case list():
            return str(value[0]).replace("REF", reference)
        case bool():
            return f'<c r="{reference}" t="b"><v>{int(value)}</v></c>'
        case str():
            return f'<c r="{reference}" t="s"><v>{texts.setdefault(value, len(texts))}</v></c>'
        case (number, style):
            return f'<c r="{reference}" s="{STYLES[style]}"><v>{number}</v></c>'
        case _:
            return f'<c r="{reference}"><v>{value}</v></c>'
