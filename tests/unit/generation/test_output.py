"""Tables of answers: CSV that a spreadsheet opens as intended, and JSON Lines that keep every value."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lora_llava.errors import RecipeError
from lora_llava.generation.output import CSV, JSONL, refuse_output, write_table

LAST = ("prediction", "cut")


def cells(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file))


def written(tmp_path: Path, *rows: dict[str, Any]) -> list[list[str]]:
    write_table(tmp_path / "out.csv", rows, LAST)
    return cells(tmp_path / "out.csv")


@pytest.mark.parametrize(
    "text",
    [
        "=1+1",
        "+cmd|' /C calc'!A0",
        "-2+3",
        "@SUM(A1)",
        "\t=1",
        " =1",
        "\r\n=1",
        "=",
        "-",
        "+5 mm",
        "\uff1d1",
        "-1e",
        "+1.5.2",
    ],
)
def test_formulas_become_text(tmp_path: Path, text: str) -> None:
    [[column, *_], [_, value, _]] = written(tmp_path, {text: 1, "prediction": text, "cut": False})
    assert (column, value) == (f"'{text}", f"'{text}")


@pytest.mark.parametrize(
    "text",
    ["yes", "-3", "+5", "-0.25", "-1e-3", "", "a=b", "5-3", "'", "a@b", "Größe 日本", 'a "b", c;\td'],
)
def test_other_text_stays(tmp_path: Path, text: str) -> None:
    assert written(tmp_path, {"prediction": text, "cut": False})[1][0] == text


def test_excel_reads_utf_8_by_its_mark_and_rows_by_their_ends(tmp_path: Path) -> None:
    written(tmp_path, {"q": "Größe?\nzweite Zeile", "prediction": "groß", "cut": True})
    content = (tmp_path / "out.csv").read_bytes()
    assert content.startswith(b"\xef\xbb\xbfq,prediction,cut\r\n")
    assert content.endswith("groß,true\r\n".encode())
    assert cells(tmp_path / "out.csv")[1][0] == "Größe?\nzweite Zeile"


def test_columns_of_all_rows_come_before_the_answers(tmp_path: Path) -> None:
    first = {"id": "1", "site": None, "prediction": "a", "cut": False}
    second = {"id": "2", "dose": 0.5, "list": ["a", "ß"], "prediction": "b", "cut": False}
    assert written(tmp_path, first, second) == [
        ["id", "site", "dose", "list", "prediction", "cut"],
        ["1", "", "", "", "a", "false"],
        ["2", "", "0.5", '["a", "ß"]', "b", "false"],
    ]


def test_json_lines_keep_values(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"id": "ß", "site": None, "prediction": "=1+1", "cut": False}, {"dose": -0.5}]
    write_table(tmp_path / "out.JSONL", rows, LAST)
    lines = (tmp_path / "out.JSONL").read_text(encoding="utf-8").splitlines()
    assert list(map(json.loads, lines)) == rows
    assert "ß" in lines[0]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def rows() -> Any:
        yield {"prediction": "a"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_table(tmp_path / "out.jsonl", rows(), LAST)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out", "out.xlsx", "out.json", ".csv"])
def test_other_forms_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"its name must end in .csv or .jsonl"):
        refuse_output(Path(name), (CSV, JSONL))
