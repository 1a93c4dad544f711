"""Files as other systems leave them: read, or refused in one line that says what to do."""

from __future__ import annotations

import json
import os
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lora_llava.cli.options import split_of
from lora_llava.data.load import load_records
from lora_llava.data.record import Record
from lora_llava.data.sources.tables import read_document
from lora_llava.errors import DataError, RecipeError
from lora_llava.planning.proposal.look import look_at
from lora_llava.planning.proposal.text import recipe_text
from lora_llava.recipe.file import read_recipe
from lora_llava.recipe.stages import DataSettings

COLUMNS = {"question": "question", "answer": "answer"}


@pytest.fixture(autouse=True)
def _in_its_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def load(path: str, **columns: str) -> list[Record]:
    return load_records(DataSettings.model_validate({"path": path, "columns": {**COLUMNS, **columns}}))


def refusal(path: str) -> str:
    with pytest.raises(DataError) as caught:
        load(path)
    return str(caught.value)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "y" * 99)


def no_rows(path: Path) -> None:
    pq.write_table(pa.table({"question": pa.array([], pa.string()), "answer": pa.array([], pa.string())}), path)


def two_of_a_name(path: Path) -> None:
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    pq.write_table(pa.table(columns, names=["question", "answer", "answer"]), path)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.csv", zipped, "a.csv: is no text, but a ZIP archive, or a workbook; name a workbook .xlsx"),
        (
            "a.csv",
            lambda path: Image.new("RGB", (9, 9)).save(path, "PNG"),
            "a.csv: is no text, but an image; name a table",
        ),
        ("a.parquet", no_rows, "a.parquet: holds no records; correct path"),
        ("a.parquet", two_of_a_name, "a.parquet: column 'answer' occurs twice; rename one"),
    ],
)
def test_what_is_no_table_is_refused(name: str, write: Callable[[Path], None], message: str) -> None:
    write(Path(name))
    assert message in refusal(name)


def test_text_in_utf_16_without_its_mark_is_still_named() -> None:
    Path("a.csv").write_bytes("question,answer\nWas?,Riß\n".encode("utf-16-le"))
    assert "by encoding: utf-16-le" in refusal("a.csv")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("x" * 300 + ".csv", "is not a path: File name too long. Correct the path."),
        ("x" * 300, "is not a path: File name too long. Correct the path."),
        ("", "the path of the data is empty. Give a file, a directory, or"),
        (os.fsdecode(b"b\xff.csv"), "b\\udcff.csv has a name that is not UTF-8. Rename it."),
        ("~nobody-of-this-name/a.csv", "~nobody-of-this-name/a.csv does not exist. Correct the path."),
    ],
)
def test_a_path_that_cannot_be_one_is_refused(path: str, message: str) -> None:
    assert message in refusal(path)
    assert split_of(path, None, "test") == "test"
    with pytest.raises(DataError) as caught:
        look_at(path)
    assert message in str(caught.value)


def test_a_suffix_in_capitals_comes_with_the_name_to_give() -> None:
    Path("A.CSV").write_text("question,answer\nWhat?,a\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"A\.CSV: rename it to A\.csv: suffixes are in lower case"):
        look_at("A.CSV")


def test_json_to_convert_may_begin_with_a_mark() -> None:
    for encoding in ("utf-8-sig", "utf-16"):
        Path("a.json").write_bytes(json.dumps([{"a": "ä"}], ensure_ascii=False).encode(encoding))
        assert read_document(Path("a.json")) == [{"a": "ä"}]


def test_a_recipe_in_utf_16_is_refused_with_a_fix() -> None:
    Path("r.yaml").write_bytes("name: a".encode("utf-16"))
    with pytest.raises(RecipeError, match=r"is not UTF-8 text \(byte 0\); save it as UTF-8"):
        read_recipe(Path("r.yaml"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Prüf Bögen", "pruf_bogen"), ("-A_1-", "a_1"), ("日本", "data"), ("Ärzte (2)", "arzte_2"), ("x.Y", "x_y")],
)
def test_init_names_the_recipe_after_any_file(name: str, expected: str) -> None:
    Path(f"{name}.csv").write_text("question,answer\n" + "Is it?,no\nWhat?,a\n" * 9, encoding="utf-8")
    Path("recipe.yaml").write_text(recipe_text(look_at(f"{name}.csv"), Path("recipe.yaml"), "a/b"), encoding="utf-8")
    assert read_recipe(Path("recipe.yaml")).name == expected


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_an_image_is_found_whatever_form_its_accents_have(stored: str) -> None:
    other = {"NFC": "NFD", "NFD": "NFC"}[stored]
    Image.new("RGB", (9, 9)).save(unicodedata.normalize(stored, "Brötchen.png"))
    asked = unicodedata.normalize(other, "Brötchen.png")
    Path("a.csv").write_text(f"image,question,answer\n{asked},What?,a\n", encoding="utf-8")
    [record] = load("a.csv", image="image")
    assert record.image is not None
    assert record.image.asked == asked
    assert Path(record.image.key).name == unicodedata.normalize(stored, "Brötchen.png")


def test_a_name_in_no_unicode_below_a_directory_is_told() -> None:
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path("d", folder).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(Path("d", folder, "1.png"))
    os.rename(b"d/b/1.png", b"d/b/\xff.png")  # noqa: PTH104 - a name in bytes
    with pytest.raises(DataError) as caught:
        load_records(DataSettings.model_validate({"path": "d", "columns": {"image": "image", **COLUMNS}}))
    assert "An error occurred while generating the dataset" not in str(caught.value)
