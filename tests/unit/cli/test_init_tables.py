"""`lora-llava init` on tables that do not say it all: other encodings, names of columns, and places of files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.helpers.published_sets import picture
from tests.helpers.raw_data import COUNT
from tests.helpers.workbook import write_workbook
from tests.unit.cli.test_init import initialized, run, said


@pytest.fixture(autouse=True)
def _in_its_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["t.csv", "t.json"])
def test_the_encoding_of_a_table_can_be_given(tiny_base: Path, name: str) -> None:
    rows = [(f"Is it caff\u00e8 {number}?", "\u00e8") for number in range(12)]
    made = [{"question": question, "answer": answer} for question, answer in rows]
    lines = ["question,answer", *(",".join(row) for row in rows)]
    content = json.dumps(made, ensure_ascii=False) if name == "t.json" else "\n".join(lines)
    Path(name).write_bytes(content.encode("cp1252"))
    refused = run("init", name, "--base-model", tiny_base)
    assert refused.exit_code == 1
    assert "in a command by --encoding cp1252" in said(refused)
    made = run("init", name, "--base-model", tiny_base, "--encoding", "cp1252")
    assert made.exit_code == 0, made.output
    recipe = yaml.safe_load(Path("recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["stages"]["instruct"]["data"]["encoding"] == "cp1252"
    assert run("finetune", "recipe.yaml", "--dry-run").exit_code == 0


def test_an_encoding_of_what_is_no_text_is_refused() -> None:
    Path("pictures").mkdir()
    for number in range(2):
        picture(Path("pictures") / str(number) / "0.png", (9, 9), number)
    refused = run("init", "pictures", "--encoding", "cp1252")
    assert refused.exit_code == 2
    assert "encoding applies to text files: .json, .jsonl, .csv and .tsv; remove it" in said(refused)
    assert "encoding 'klingon' is not known" in said(run("init", "pictures", "--encoding", "klingon"))


@pytest.mark.parametrize("form", ["one", "two", "keyed"])
def test_a_column_of_image_names_is_the_image_whatever_its_name(tiny_base: Path, form: str) -> None:
    rows = []
    for number in range(COUNT):
        picture(Path("pictures") / f"{number}.png", (12, 10), number)
        rows.append({"scan": f"{number}.png", "question": f"Is it {number}?", "answer": "yes"})
    if form == "keyed":
        content = json.dumps({row.pop("scan"): row for row in rows})
    else:
        content = json.dumps([row | ({"before": "0.png"} if form == "two" else {}) for row in rows])
    Path("t.json").write_text(content, encoding="utf-8")
    recipe = initialized(Path("t.json"), tiny_base)
    columns = recipe["stages"]["instruct"]["data"]["columns"]
    assert columns["image"] == ("id" if form == "keyed" else "scan")
    note = "A record has one image, that of scan; not used: before."
    assert (note in Path("recipe.yaml").read_text(encoding="utf-8")) is (form == "two")


def test_the_reason_why_no_row_of_a_workbook_is_read_is_given() -> None:
    write_workbook(Path("t.xlsx"), {"A": [[None, "image", "question", "answer"], [0, "a.png", "Is it?", "yes"]]})
    assert "t.xlsx, line 2: a value in column 1, which has no name in the first row; name it" in said(
        run("init", "t.xlsx")
    )


def test_a_data_file_below_a_directory_of_images_is_named() -> None:
    picture(Path("data/train/0.png"), (9, 9), 0)
    Path("data/train/metadata.csv").write_text("file_name,text\n0.png,a crack\n", encoding="utf-8")
    assert f"or name the data file {Path.cwd()}/data/train/metadata.csv" in said(run("init", "data"))
