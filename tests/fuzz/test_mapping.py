"""The mapping of columns: every row becomes a record or a named bad one, whatever the settings and the data are."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lora_llava.data.bad_records import BadRecords
from lora_llava.data.load import fingerprint, read_source
from lora_llava.data.sources.files.encodings import decode
from lora_llava.data.sources.files.sheets import read_sheet
from lora_llava.errors import DataError
from lora_llava.recipe.columns import Field, template_parts
from lora_llava.recipe.stages import DataSettings
from tests.fuzz.mutations import changed_bytes, changed_value
from tests.helpers.workbook import write_workbook

ROWS = [
    {"id": 7, "image": "a.png", "q": "What?", "a": "B", "n": 1, "opts": ["x", "y"], "qas": [{"q": "Who?", "a": "x"}]},
    {"id": 8, "image": ["sub/b.png"], "q": "Why?", "a": ["x", "x", "y"], "n": 0.0, "opts": '["x", "y"]', "qas": []},
    {"id": 9, "image": None, "q": "", "a": None, "n": True, "opts": None, "qas": [{"q": "How?"}, "x"], "m": {"k": [1]}},
]
NAMES = st.sampled_from(
    ["id", "image", "q", "a", "n", "opts", "qas", "m", "m.k", "m.k.0", "opts.1", "nothing", "", "."]
)
TEMPLATES = st.lists(
    st.one_of(
        NAMES.map(lambda name: f"{{{name}}}"),
        st.sampled_from(
            ["{n:03d}", "{id:.2f}", "{{", "}}", "{", "}", "{}", "{n!r}", "{n.__class__}", "{q:>9}", "x.png"]
        ),
        st.text(max_size=3),
    ),
    max_size=3,
).map("".join)
TEXTS = st.one_of(NAMES, TEMPLATES, TEMPLATES.map(lambda text: {"text": text}), changed_value({"text": "x"}))
ANSWERS = st.one_of(
    TEXTS,
    st.builds(
        lambda how, name: {how: name},
        st.sampled_from(["index", "number", "letter", "first", "majority", "last"]),
        NAMES,
    ),
    NAMES.map(lambda name: {"map": {"B": "yes", 1: 0, False: "no"}, "of": name}),
    changed_value({"map": {"B": "yes"}, "of": "a"}),
)
COLUMNS = st.fixed_dictionaries(
    {"question": TEXTS, "answer": ANSWERS},
    optional={
        "image": st.one_of(NAMES, TEMPLATES),
        "choices": st.one_of(NAMES, st.lists(NAMES, max_size=3)),
        "references": NAMES,
        "system": TEXTS,
        "type": NAMES,
    },
)
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-2, 9), st.sampled_from(["B", "x", "", "1"]))
SELECTION = st.fixed_dictionaries(
    {},
    optional={
        "where": st.dictionaries(NAMES, st.one_of(VALUES, st.lists(VALUES, max_size=2)), max_size=2),
        "each": st.one_of(NAMES, st.lists(NAMES, max_size=2)),
        "group": st.one_of(NAMES, TEMPLATES),
        "max_records": st.integers(1, 3),
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mapping")
    (directory / "sub").mkdir()
    for name in ("a.png", "sub/b.png", "7.png", "x.png"):
        (directory / name).write_bytes(b"x")
    return directory


def read(path: Path, settings: dict[str, Any]) -> None:
    """Read data strictly and leniently: only DataError comes out, and both agree."""
    try:
        data = DataSettings.model_validate({"path": str(path), **settings})
    except ValidationError as error:
        assert str(error)
        return
    try:
        strict = read_source(data, BadRecords(data, 0), extra=True)
    except DataError as error:
        assert str(error)
        strict = None
    bad = BadRecords(data, None)
    try:
        lenient = read_source(data, bad, extra=True)
    except DataError:
        assert strict is None
        return
    if strict is not None:
        assert fingerprint(strict) == fingerprint(lenient)
        assert not bad.records
    numbers = [record.number for record in lenient] + [one.record for one in bad.records]
    assert len(set(numbers)) == len(numbers) <= (data.max_records or len(numbers))
    for record in lenient:
        assert (
            record.image is None or record.image.path is None or record.image.path.is_relative_to(path.parent.resolve())
        )
        assert all(isinstance(turn.text, str) for turn in record.turns)


@given(rows=changed_value(ROWS), columns=COLUMNS, selection=SELECTION)
def test_changed_rows_under_any_mapping(folder: Path, rows: Any, columns: Any, selection: Any) -> None:
    (folder / "rows.json").write_text(json.dumps(rows))
    read(folder / "rows.json", {"columns": columns, **selection})


@given(columns=COLUMNS, selection=SELECTION, records=st.one_of(st.none(), NAMES))
def test_rows_inside_an_object(folder: Path, columns: Any, selection: Any, records: str | None) -> None:
    for content in ({"m": {"k": ROWS}}, {str(row["id"]): row for row in ROWS}):
        (folder / "object.json").write_text(json.dumps(content))
        read(folder / "object.json", {"columns": columns, "records": records, **selection})


@given(
    content=changed_bytes(
        [
            "image;q;a\r\na.png;Größe?;B\r\n".encode(code)
            for code in ("utf-8", "utf-8-sig", "utf-16", "cp1252", "utf-16-le")
        ]
    ),
    encoding=st.sampled_from([None, "utf-8", "utf-16", "cp1252", "cp1251", "shift_jis", "utf-7", "punycode"]),
)
def test_tables_in_any_encoding(folder: Path, content: bytes, encoding: str | None) -> None:
    (folder / "t.csv").write_bytes(content)
    read(folder / "t.csv", {"columns": {"question": "q", "answer": "a"}, "encoding": encoding})
    try:
        text = decode(content, None, "t.csv")
    except DataError:
        return
    # What is read without a declared encoding is the text in it, byte by byte.
    codes = ("utf-8", "utf-8-sig", "utf-16", "cp1252")
    assert any(text.encode(code, "replace") in (content, content.removeprefix(b"\xff\xfe")) for code in codes) or (
        text.encode("utf-16-be") == content[2:]
    )


@pytest.fixture(scope="module")
def workbook(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    rows = [["image", "q", "a"], ["a.png", "Größe?", (45413, "date")], [None, True, 2.5]]
    return write_workbook(tmp_path_factory.mktemp("book") / "t.xlsx", {"A": rows}).read_bytes()


@given(data=st.data())
def test_changed_workbooks(folder: Path, workbook: bytes, data: st.DataObject) -> None:
    (folder / "t.xlsx").write_bytes(data.draw(changed_bytes([workbook])))
    try:
        assert all(
            entry.error is not None or isinstance(entry.value, dict) for entry in read_sheet(folder / "t.xlsx", None)
        )
    except DataError as error:
        assert "t.xlsx" in str(error)


@given(data=st.data())
def test_workbooks_of_changed_parts(folder: Path, workbook: bytes, data: st.DataObject) -> None:
    with zipfile.ZipFile(io.BytesIO(workbook)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = data.draw(st.sampled_from(sorted(parts)))
    with zipfile.ZipFile(folder / "parts.xlsx", "w") as archive:
        for part, content in parts.items():
            archive.writestr(part, data.draw(changed_bytes([content])) if part == name else content)
    try:
        assert all(
            (entry.error is None) == isinstance(entry.value, dict) for entry in read_sheet(folder / "parts.xlsx", None)
        )
    except DataError as error:
        assert "parts.xlsx" in str(error)


@given(text=TEMPLATES)
def test_templates_are_texts_and_fields(text: str) -> None:
    try:
        parts = template_parts(text)
    except ValueError as error:
        assert str(error)
        return
    written = "".join(
        part.replace("{", "{{").replace("}", "}}")
        if isinstance(part, str)
        else f"{{{part.path}{':' if part.number_format else ''}{part.number_format}}}"
        for part in parts
    )
    assert written == text
    assert all(part.path.strip() for part in parts if isinstance(part, Field))


@given(
    rows=st.lists(
        st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=4), min_size=2, max_size=2),
        max_size=3,
    )
)
def test_a_table_that_python_wrote_is_read_back(folder: Path, rows: list[list[str]]) -> None:
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([["question", "answer"], *rows])
    (folder / "w.csv").write_bytes(stream.getvalue().encode())
    data = DataSettings.model_validate(
        {"path": str(folder / "w.csv"), "columns": {"question": "question", "answer": "answer"}}
    )
    bad = BadRecords(data, None)
    try:
        records = read_source(data, bad)
    except DataError:
        assert any("\r" in cell or "\n" in cell for row in rows for cell in row) or not rows
        return
    told = {record.number: [turn.text for turn in record.turns] for record in records}
    assert all(told[number] == rows[number - 1] for number in told)
