"""Tables as spreadsheets write them: .xlsx, and CSV in the encodings of Excel. Never mojibake."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lora_llava.data.load import load_records
from lora_llava.data.record import MAX_CHARACTERS, Record
from lora_llava.data.sources.files import sheets
from lora_llava.data.sources.files.encodings import decode
from lora_llava.data.sources.files.sheets import read_sheet
from lora_llava.data.sources.tables import read_rows
from lora_llava.errors import DataError
from lora_llava.recipe.stages import DataSettings
from tests.helpers.workbook import write_workbook

QA = {"question": "Frage", "answer": "Antwort"}
HEAD = ["Frage", "Antwort"]


def load(path: Path, **settings: Any) -> list[Record]:
    return load_records(DataSettings.model_validate({"path": str(path), "columns": QA, **settings}), extra=True)


def texts(record: Record) -> tuple[str, ...]:
    return tuple(turn.text for turn in record.turns)


def rows(path: Path, sheet: str | None = None) -> list[Any]:
    return [entry.value for entry in read_sheet(path, sheet)]


# --- .xlsx


def changed(path: Path, old: str, new: str) -> Path:
    """Write a workbook again with a text replaced in all its parts."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name).decode() for name in archive.namelist()}
    assert any(old in content for content in parts.values())
    with zipfile.ZipFile(path.with_name("changed.xlsx"), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content.replace(old, new))
    return path.with_name("changed.xlsx")


def test_a_sheet_is_read_by_the_names_in_its_first_row(tmp_path: Path) -> None:
    sheet = [[None], HEAD, ["Größe?\nja & <b>", 3.0], [None, None], ["Was?", 2.5], ["Ja?", True]]
    first, second, third = load(write_workbook(tmp_path / "t.xlsx", {"A": sheet}))
    assert texts(first) == ("Größe?\nja & <b>", "3")
    assert (texts(second), texts(third)) == (("Was?", "2.5"), ("Ja?", "true"))
    assert second.where == "t.xlsx, record 2 (line 5)"


def test_another_sheet_is_read_by_its_name(tmp_path: Path) -> None:
    path = write_workbook(tmp_path / "t.xlsx", {"A": [HEAD, ["a", "b"]], "Zwei": [HEAD, ["c", "d"]]})
    assert [texts(record) for record in load(path)] == [("a", "b")]
    assert [texts(record) for record in load(path, name="Zwei")] == [("c", "d")]
    with pytest.raises(DataError, match=r"t\.xlsx: there is no sheet 'Drei'; it has A, Zwei; correct name"):
        load(path, name="Drei")


def test_dates_are_texts_of_iso_and_other_formats_stay_numbers(tmp_path: Path) -> None:
    row = [(45413, "date"), (45413.5, "own date"), (0.5, "date"), (3, "percent"), 45413]
    path = write_workbook(tmp_path / "t.xlsx", {"A": [list("abcde"), row]})
    assert list(rows(path)[0].values()) == ["2024-05-01", "2024-05-01 12:00:00", "12:00:00", 3, 45413]
    path = write_workbook(tmp_path / "m.xlsx", {"A": [["a"], [(0, "date"), None]]}, '<workbookPr date1904="1"/>')
    assert list(rows(path)[0].values()) == ["00:00:00"]
    row = [(0.25, "duration"), (1.5, "duration"), (45413, "Chinese date"), (45413.25, "Chinese date")]
    path = write_workbook(tmp_path / "d.xlsx", {"A": [list("abcd"), row]})
    assert list(rows(path)[0].values()) == ["06:00:00", "36:00:00", "2024-05-01", "2024-05-01 06:00:00"]
    path = write_workbook(tmp_path / "e.xlsx", {"A": [["a"], [(1, "Chinese date")]]}, '<workbookPr date1904="1"/>')
    assert list(rows(path)[0].values()) == ["1904-01-02"]


def test_cells_of_every_kind(tmp_path: Path) -> None:
    cells = {
        '<c r="REF" t="inlineStr"><is><r><t>rich </t></r><r><t>text</t></r>'
        '<rPh sb="0" eb="1"><t>no</t></rPh></is></c>': "rich text",
        '<c r="REF" t="str"><f>A1</f><v>formula</v></c>': "formula",
        '<c r="REF"><f>A1</f></c>': None,
        '<c r="REF" t="d"><v>2024-05-01</v></c>': "2024-05-01",
        '<c r="REF" t="n"><v>12345678901</v></c>': 12345678901,
        '<c r="REF" t="n"><v>1E20</v></c>': 1e20,
        '<c r="REF" t="d"><v>2024-05-01T10:30:00</v></c>': "2024-05-01 10:30:00",
        '<c r="REF" t="b"><v>0</v></c>': False,
        '<c r="REF" t="inlineStr"><is><t>a_x000D_b _x263A_</t></is></c>': "a\rb \u263a",
        '<c r="REF" t="inlineStr"><is><t> </t></is></c>': None,
    }
    names = [chr(97 + index) for index in range(len(cells) + 1)]
    path = write_workbook(tmp_path / "t.xlsx", {"A": [names, [*([cell] for cell in cells), "last"]]})
    assert repr(list(rows(path)[0].values())) == repr([*cells.values(), "last"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([['<c r="REF" t="e"><v>#N/A</v></c>'], "x"], r"line 3: cell A3 holds the error #N/A; correct its formula"),
        (["a", (10**8, "date")], r"line 3: cell B3 holds the error #VALUE!; correct its formula"),
        (["a", "x" * (MAX_CHARACTERS + 1)], r"line 3: cell B3 has 1,000,001 characters; shorten it"),
        (["a", ['<c r="XFD3"><v>1</v></c>']], r"line 3: a value in column 16384, which has no name"),
        (["a", "b", "c"], r"line 3: a value in column 3, which has no name in the first row; name it"),
    ],
)
def test_a_row_that_cannot_be_read_is_one_bad_record(tmp_path: Path, row: list[Any], message: str) -> None:
    path = write_workbook(tmp_path / "t.xlsx", {"A": [HEAD, ["a", "b"], row, ["c", "d"]]})
    with pytest.raises(DataError, match=message):
        load(path)
    assert [texts(record) for record in load(path, on_bad_record="skip")] == [("a", "b"), ("c", "d")]


def test_names_of_columns_are_there_and_each_once(tmp_path: Path) -> None:
    for sheet, message in (([["a", "a"]], "column 'a' occurs twice"), ([], "is empty"), ([[None]], "is empty")):
        with pytest.raises(DataError, match=message):
            rows(write_workbook(tmp_path / "t.xlsx", {"A": sheet}))


def test_what_is_no_workbook_is_refused(tmp_path: Path) -> None:
    good = write_workbook(tmp_path / "t.xlsx", {"A": [HEAD, ["a", "b"]]}).read_bytes()
    for content in (b"", b"PK", good[:-40], good[:200], good.replace(b"sheet1", b"sheet9")):
        (tmp_path / "bad.xlsx").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.xlsx: is no \.xlsx workbook; save it in Excel"):
            rows(tmp_path / "bad.xlsx")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        rows(tmp_path / "absent.xlsx")
    (tmp_path / "dir.xlsx").mkdir()
    with pytest.raises(DataError, match="is not a regular file"):
        rows(tmp_path / "dir.xlsx")


def test_a_bomb_in_a_workbook_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = write_workbook(tmp_path / "t.xlsx", {"A": [HEAD, ["a", "b"]]})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("xl/sharedStrings.xml", b" " * 2**22)
    with pytest.raises(DataError, match="unpacks to 4,194,304 bytes, far more than its size"):
        rows(path)


def test_row_numbers_and_dimensions_that_lie(tmp_path: Path) -> None:
    path = write_workbook(tmp_path / "t.xlsx", {"A": [HEAD, ["a", "b"], ["c", "d"]]})
    expected = [dict(zip(HEAD, row, strict=True)) for row in (("a", "b"), ("c", "d"))]
    for dimension in ("A1:A1", "B2", "A1:XFD1048576"):
        assert rows(changed(path, "<sheetData>", f'<dimension ref="{dimension}"/><sheetData>')) == expected
    last = changed(path, '<row r="3">', '<row r="1048576">')
    assert [(entry.value, entry.line) for entry in read_sheet(last, None)] == [(expected[0], 2), (expected[1], 2**20)]
    for old, new in (('<row r="3">', '<row r="1048577">'), ('<row r="3">', f'<row r="{10**18}">'), ('"B3"', '"XFE3"')):
        with pytest.raises(DataError, match=r"changed\.xlsx: is no \.xlsx workbook"):
            rows(changed(path, old, new))


def test_no_row_is_dropped_whatever_its_number(tmp_path: Path) -> None:
    path = write_workbook(tmp_path / "t.xlsx", {"A": [HEAD, *([f"q{number}", "a"] for number in range(4))]})
    path = changed(path, '<row r="3">', '<row r="2">')  # as often as the row before
    path = changed(path, '<row r="4">', "<row>")  # without a number: one more than the row before
    path = changed(path, '<row r="5">', '<row r="1">')  # below the row before
    assert [entry.value["Frage"] for entry in read_sheet(path, None)] == ["q0", "q1", "q2", "q3"]
    assert [entry.line for entry in read_sheet(path, None)] == [2, 2, 3, 1]


HOSTILE = {
    "a dimension without end": ("<sheetData>", f'<dimension ref="{"A" * 300_000}"/><sheetData>', 2),
    "rows as wide as Excel allows": ("</sheetData>", '<row><c r="XFD1"/></row>' * 20_000 + "</sheetData>", 2),
    "rows at both ends": (
        "</sheetData>",
        '<row r="1048576"><c r="A1"><v>1</v></c></row><row r="1"/>' * 5_000 + "</sheetData>",
        5_002,
    ),
    "merged ranges": ("</sheetData>", "</sheetData>" + '<mergeCell ref="A1:XFD1048576"/>' * 30_000, 2),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_attributes_cost_no_more_than_their_text(tmp_path: Path, name: str) -> None:
    old, new, count = HOSTILE[name]
    path = write_workbook(tmp_path / "t.xlsx", {"A": [HEAD, ["a", "b"], ["c", "d"]]})
    path = changed(path, old, new)
    start = time.process_time()
    assert len(rows(path)) == count
    # Filled up to the widest column, the second would take minutes.
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("bound", "most", "message"),
    [
        ("_MAX_ROWS", 150, "has more than 150 rows or 16,777,216 cells; save it as CSV"),
        ("_MAX_CELLS", 50, "has more than 1,048,576 rows or 50 cells; save it as CSV"),
        ("_MAX_STRINGS", 30, "has more than 30 different texts; save it as CSV"),
        ("_MAX_ELEMENTS", 3, "a row or text has more than 3 parts; save it as CSV"),
        ("_MAX_TAGS", 5, r"[\w./\[\]]+ has more than 5 tags; save it as CSV"),
    ],
)
def test_a_workbook_beyond_a_bound_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, most: int, message: str
) -> None:
    path = write_workbook(tmp_path / "t.xlsx", {"A": [HEAD, *([f"q{number}", "a"] for number in range(40))]})
    path = changed(path, "</sheetData>", '<row r="1"/>' * 160 + "</sheetData>")
    assert len(rows(path)) == 40
    monkeypatch.setattr(sheets, bound, most)
    with pytest.raises(DataError, match=rf"changed\.xlsx: {message}"):
        rows(path)


def test_names_of_ranges_cost_no_time(tmp_path: Path) -> None:
    area = f'<definedName name="_xlnm.Print_Area" localSheetId="0">{chr(39) * 50_000}</definedName>'
    path = write_workbook(tmp_path / "t.xlsx", {"A": [HEAD, ["a", "b"]]})
    path = changed(path, "</sheets>", f"</sheets><definedNames>{area}</definedNames>")
    assert rows(path) == [{"Frage": "a", "Antwort": "b"}]


def test_strict_open_xml_is_refused(tmp_path: Path) -> None:
    path = write_workbook(tmp_path / "t.xlsx", {"A": [HEAD, ["a", "b"]]})
    path = changed(path, "http://schemas.openxmlformats.org/officeDocument/2006", "http://purl.oclc.org/ooxml/document")
    with pytest.raises(DataError, match=r"is no \.xlsx workbook; save it in Excel"):
        rows(path)


def test_the_warnings_of_the_library_are_silenced_and_no_others(tmp_path: Path) -> None:
    path = write_workbook(tmp_path / "t.xlsx", {"A": [HEAD, *[["a", "b"]] * 200]})
    path = changed(path, "</worksheet>", '<extLst><ext uri="{x}"/></extLst></worksheet>')
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in read_sheet(path, None):
            warnings.warn("of the caller", stacklevel=1)
    assert [str(warning.message) for warning in heard] == ["of the caller"] * 200


def test_the_library_is_imported_when_a_sheet_is_read() -> None:
    code = "import sys, lora_llava.data.sources.columns; sys.exit('openpyxl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252", "cp1251"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_declared_encoding_is_read(tmp_path: Path, encoding: str, end: str) -> None:
    question = "Какой размер?" if encoding == "cp1251" else "Welche Größe à la carte?"
    path = tmp_path / "t.csv"
    path.write_bytes(
        f'Frage;Antwort{end}{question};"3 °C,{end}etwa"{end}'.replace("°", "" if "1251" in encoding else "°").encode(
            encoding
        )
    )
    (record,) = load(path, encoding=encoding)
    assert record.turns[0].text == question
    assert record.turns[1].text == f"3 {'' if '1251' in encoding else '°'}C,{end}etwa"


@pytest.mark.parametrize(
    ("encoding", "mark"), [("utf-8", b"\xef\xbb\xbf"), ("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff")]
)
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.json", "t.jsonl"])
def test_a_mark_says_the_encoding(tmp_path: Path, encoding: str, mark: bytes, name: str) -> None:
    record = '{"Frage": "Größe 尺?", "Antwort": "ß"}'
    delimiter = "\t" if name == "t.tsv" else ","
    content = {"t.json": f"[{record}]", "t.jsonl": record}.get(
        name, f"Frage{delimiter}Antwort\nGröße 尺?{delimiter}ß\n"
    )
    (tmp_path / name).write_bytes(mark + content.encode(encoding))
    assert [texts(record) for record in load(tmp_path / name)] == [("Größe 尺?", "ß")]


def test_windows_latin_is_read_undeclared_where_it_is_certain(tmp_path: Path) -> None:
    text = "Frage;Antwort\r\nIst die Lötstelle größer als 3 µm \u2013 „gut“?;4 °C, 5 % § 2\r\n"
    (tmp_path / "t.csv").write_bytes(text.encode("cp1252"))
    (record,) = load(tmp_path / "t.csv")
    assert texts(record) == ("Ist die Lötstelle größer als 3 µm \u2013 „gut“?", "4 °C, 5 % § 2")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("měření", "cp1250"),
        ("żółw", "cp1250"),
        ("Größe", "mac_roman"),
        ("Größe", "cp850"),
        ("España", "mac_roman"),
        ("è caffè", "cp1252"),
        ("Какой размер", "cp1251"),
        ("Ποιο μέγεθος", "cp1253"),
        ("大きさ", "shift_jis"),
        ("大小", "gb18030"),
        ("크기", "euc_kr"),
        ("ölçü ğı", "cp1254"),
        ("Größe", "utf-16-le"),
        ("д", "cp1251"),
        ("Äpfel", "mac_roman"),
        ("ändern", "cp850"),
        ("öffnen", "cp850"),
        ("№ 5, я", "cp1251"),
    ],
)
def test_no_text_becomes_mojibake_undeclared(text: str, encoding: str) -> None:
    raw = text.encode(encoding)
    example = encoding if encoding == "utf-16-le" else "cp1252"
    with pytest.raises(DataError, match=rf"t\.csv: not UTF-8 at byte .* encoding: {example}"):
        decode(raw, None, "t.csv")
    assert decode(raw, encoding, "t.csv") == text


def test_the_message_shows_how_the_text_would_read() -> None:
    with pytest.raises(DataError, match=r"not UTF-8 at byte 5 \(as cp1252 it reads 'caffè'\); save it as UTF-8"):
        decode("a caffè".replace("a c", "c").encode("cp1252") + b" x", None, "t.csv")
    with pytest.raises(DataError, match=r"t.csv: not ascii at byte 3; correct encoding, or save it as UTF-8"):
        decode("abß".encode(), "ascii", "t.csv")


def test_the_line_of_excel_about_the_delimiter_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("sep=;\nFrage;Antwort\na,b;c\n")
    assert [texts(record) for record in load(tmp_path / "t.csv")] == [("a,b", "c")]


def test_settings_of_files_are_refused_where_they_mean_nothing() -> None:
    for settings, message in (
        ({"path": "t.xlsx", "encoding": "cp1252"}, "encoding applies to text files"),
        ({"path": "t.csv", "encoding": "klingon"}, "encoding 'klingon' is not known"),
        ({"path": "t.csv", "encoding": "zlib"}, "encoding 'zlib' is not known"),
        ({"path": "t.csv", "records": "data"}, "records applies to .json files"),
        ({"path": "t.csv", "name": "A"}, "name and revision apply to Hub datasets"),
        ({"path": "t.xlsx", "revision": "A"}, "name and revision apply to Hub datasets"),
    ):
        with pytest.raises(ValidationError, match=message):
            DataSettings.model_validate({"columns": QA, **settings})


def test_columns_without_a_name_are_counted_and_none_hides_another(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("Frage,Antwort,,\nWas?,ja,a,b\nWie?,nein,,\n", encoding="utf-8")
    first, second = (entry.value for entry in read_rows(tmp_path / "t.csv"))
    assert first == {"Frage": "Was?", "Antwort": "ja", "column 3": "a", "column 4": "b"}
    assert second == {"Frage": "Wie?", "Antwort": "nein", "column 3": None, "column 4": None}
    [record] = load(tmp_path / "t.csv", columns={"question": "Frage", "answer": "column 4"}, on_bad_record="skip")
    assert texts(record) == ("Was?", "b")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (",,", "t.csv: is empty, must begin with a line of column names"),
        ("Frage,column 2,", None),
        ("column 3,Frage,", "column 'column 3' occurs twice in its first line; rename one"),
    ],
)
def test_a_first_line_without_names_is_none(tmp_path: Path, head: str, message: str | None) -> None:
    (tmp_path / "t.csv").write_text(f"{head}\na,b,c\n", encoding="utf-8")
    if message is None:
        assert [len(entry.value) for entry in read_rows(tmp_path / "t.csv")] == [3]
    else:
        with pytest.raises(DataError, match=message):
            list(read_rows(tmp_path / "t.csv"))
