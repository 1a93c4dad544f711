"""`lora-llava init`: from data of ten forms to a recipe that is checked and planned."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from datasets import Dataset, DatasetDict

from lora_llava.cli import cli
from tests.helpers.published_sets import (
    coco_captions,
    coco_instances,
    cvat,
    dicom,
    needs_pydicom,
    picture,
    r2gen,
    rsvqa,
    visual_genome,
)
from tests.helpers.raw_data import CONVERTED, COUNT, READ, llava_json, table, wrong


@pytest.fixture(autouse=True)
def _in_its_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def said(result: Result) -> str:
    return " ".join(result.output.split())


def initialized(data: Path, base: Path) -> dict[str, Any]:
    """Run init and the dry run; return the recipe."""
    result = run("init", data, "--base-model", base)
    assert result.exit_code == 0, result.output
    assert "0 errors" in said(result), result.output
    planned = run("finetune", "recipe.yaml", "--dry-run")
    assert planned.exit_code == 0, planned.output
    recipe: dict[str, Any] = yaml.safe_load(Path("recipe.yaml").read_text(encoding="utf-8"))
    return recipe


STAGE = {
    "class folders": {
        "path": "./data",
        "columns": {
            "image": "image",
            "question": {"text": "Which of these does the image show: crack, good, stain?"},
            "answer": "label",
        },
    },
    "csv": {
        "path": "data/labels.csv",
        "columns": {
            "image": "{label}/{file}",
            "question": {"text": "Which of these does the image show: crack, good, stain?"},
            "answer": "label",
        },
        "group": "device_id",
    },
    "llava json": {"path": "data/train.json", "image_root": "data/pictures", "group": "patient"},
    "messages": {"path": "data/data.jsonl"},
    "parquet": {
        "path": "data/data.parquet",
        "columns": {"image": "image", "question": "question", "answer": "answer"},
    },
    "shards": {
        "path": "./data",
        "columns": {"image": "png", "question": {"text": "Describe the image."}, "answer": "txt"},
    },
}
SHORT = ("class folders", "csv", "messages", "parquet")


@pytest.mark.parametrize("name", READ)
def test_a_form_that_is_read_becomes_a_recipe(tmp_path: Path, tiny_base: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    recipe = initialized(READ[name](tmp_path / "data"), tiny_base)
    data = recipe["stages"]["instruct"]["data"]
    assert data.pop("validation") == {"share": 0.2}
    assert data.pop("answer_prompt", None) == (
        "Answer the question using a single word or phrase." if name in SHORT else None
    )
    assert data == STAGE[name]
    assert recipe["base"] == {"model_name_or_path": str(tiny_base)}
    assert recipe["stages"]["instruct"]["num_train_epochs"] == 10
    assert recipe["stages"]["instruct"]["batch_size"] == 8
    written = Path("recipe.yaml").read_text(encoding="utf-8")
    assert f"{9 if name == 'llava json' else COUNT} records on" in written
    assert "Fewer than 150 may be too few to learn" in written
    assert ("evaluation" in recipe) == (name == "llava json")
    assert ("images" in recipe) == (name == "csv")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_pydicom if name == "dicom" else ()) for name in CONVERTED]
)
def test_a_form_that_must_be_converted_names_the_command_which_works(
    tmp_path: Path, tiny_base: Path, name: str
) -> None:
    make, command = CONVERTED[name]
    (tmp_path / "data").mkdir()
    data = make(tmp_path / "data")
    refused = run("init", data, "--base-model", tiny_base)
    assert refused.exit_code == 1
    assert command.format(data=data) in said(refused)
    assert not Path("recipe.yaml").exists()
    parts = command.format(data=data).removesuffix(". Then").split()
    converted = run(*parts[1:])
    assert converted.exit_code == 0, converted.output
    recipe = initialized(Path("converted"), tiny_base)
    assert recipe["stages"]["instruct"]["data"]["path"] == "converted/records.jsonl"


@needs_pydicom
def test_a_table_that_names_dicom_files_names_the_command_which_works(tmp_path: Path, tiny_base: Path) -> None:
    scans = dicom(tmp_path / "data" / "scans")
    names = sorted(path.relative_to(scans).as_posix() for path in scans.rglob("*.dcm"))
    rows = [
        f"{name},Is there a {what}?,{answer}" for name in names for what, answer in (("nodule", "no"), ("rib", "yes"))
    ]
    Path("data/questions.csv").write_text("\n".join(["image,question,answer", *rows]), encoding="utf-8")
    refused = run("init", "data/questions.csv")
    assert refused.exit_code == 1
    command = f"lora-llava convert dicom {scans} converted --table {tmp_path}/data/questions.csv"
    assert f"questions.csv: names DICOM files, which must be converted first: {command}. Then" in said(refused)
    converted = run(*command.split()[1:])
    assert converted.exit_code == 0, converted.output
    assert f"records.jsonl: {2 * len(names)} records" in converted.output
    initialized(Path("converted"), tiny_base)


@pytest.mark.parametrize(
    ("make", "kind"),
    [(coco_captions, "coco"), (cvat, "cvat"), (r2gen, "r2gen"), (rsvqa, "rsvqa"), (visual_genome, "visual-genome")],
)
def test_the_other_forms_are_recognized(tmp_path: Path, make: Any, kind: str) -> None:
    result = run("init", make(tmp_path / "data"))
    assert f"lora-llava convert {kind} {tmp_path / 'data'} converted" in said(result)


def test_coco_in_its_own_layout_names_file_and_images(tmp_path: Path) -> None:
    coco_instances(tmp_path / "data" / "val2017")
    (tmp_path / "data" / "annotations").mkdir()
    Path("data/val2017/instances_val2017.json").rename("data/annotations/instances_val2017.json")
    file, images = tmp_path / "data/annotations/instances_val2017.json", tmp_path / "data/val2017"
    assert f"convert coco {file} converted --images {images}. Then" in said(run("init", "data"))


def test_unknown_records_are_answered_with_what_was_seen(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    result = run("init", wrong(tmp_path / "data"))
    assert result.exit_code == 1
    assert (
        "it has alpha, beta. To have it read, name its keys: in its data in a recipe by columns: {image: KEY"
        in said(result)
    )


def _nothing(directory: Path) -> None:
    (directory / "notes.txt").write_text("x", encoding="utf-8")


def _images_alone(directory: Path) -> None:
    table(directory)
    (directory / "labels.csv").unlink()
    (directory / "good" / "1.png").rename(directory / "1.png")


def _two_tables(directory: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (directory / name).write_text("image,question,answer\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_nothing, "holds no images (known formats: JPEG"),
        (_images_alone, "holds 12 images (1 not in a folder, 3 folders), but no questions and answers. Put the images"),
        (_two_tables, "holds 2 data files: a.csv, b.csv; name one of them"),
    ],
)
def test_a_directory_without_a_form_is_answered_with_what_would_work(tmp_path: Path, make: Any, message: str) -> None:
    (tmp_path / "data").mkdir()
    make(tmp_path / "data")
    result = run("init", "data")
    assert result.exit_code == 1
    assert message in said(result)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.docx", "a .docx file is not read; what is: LLaVA JSON"),
        ("a.txt", "a .txt file is not read; a table with tabs is one named .tsv, one with commas .csv; what is: LLaVA"),
        ("b.csv", "none of its records can be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, message: str) -> None:
    Path(name).write_text("image,question,answer\nx.png,,\n", encoding="utf-8")
    result = run("init", name)
    assert result.exit_code == 1
    assert message in said(result)


def test_what_is_neither_here_nor_on_the_hub_is_named(tmp_path: Path) -> None:
    result = run("init", "no/such/data")
    assert result.exit_code == 1
    assert "no/such/data does not exist. Correct the path." in said(result)


def test_a_recipe_is_never_overwritten(tmp_path: Path) -> None:
    Path("recipe.yaml").write_text("mine", encoding="utf-8")
    result = run("init", "data")
    assert result.exit_code == 2
    assert "recipe.yaml already exists and is not overwritten" in said(result)
    assert Path("recipe.yaml").read_text(encoding="utf-8") == "mine"


def test_a_recipe_whose_base_cannot_be_read_stays_and_is_checked_later(tmp_path: Path, tiny_base: Path) -> None:
    llava_json(tmp_path / "data")
    result = run("init", "data", "--base-model", "./absent", "--output", "my recipe.yaml")
    assert result.exit_code == 2
    assert "absent" in said(result)
    command = "lora-llava check 'my recipe.yaml'"
    assert said(result).endswith(f"my recipe.yaml is written, but not checked. Correct it, then: {command}")
    recipe = Path("my recipe.yaml")
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("./absent", str(tiny_base)), encoding="utf-8")
    assert run(*shlex.split(command)[1:]).exit_code == 0


def test_records_that_cannot_be_read_are_counted_in_the_recipe(tmp_path: Path, tiny_base: Path) -> None:
    llava_json(tmp_path / "data")
    path = tmp_path / "data" / "train.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    records[4]["conversations"][1]["value"] = None
    path.write_text(json.dumps(records), encoding="utf-8")
    result = run("init", "data", "--base-model", tiny_base)
    assert result.exit_code == 1, "check finds it"
    written = Path("recipe.yaml").read_text(encoding="utf-8")
    assert "# 1 record cannot be read; the first: train.json, record 5" in written
    assert "# on_bad_record: skip" in written


@pytest.mark.parametrize(("heading", "image"), [("kind", "{kind}/{file}"), ("remark", "file")])
def test_folders_with_the_same_file_names_are_told_apart_by_a_column_or_reported(
    tmp_path: Path, tiny_base: Path, heading: str, image: str
) -> None:
    # The first 200 rows, by which init decides, are of one folder.
    lines = [f"file;{heading};question;answer"]
    for number, folder in enumerate(("good", "stain")):
        picture(tmp_path / "data" / folder / "0.png", (12, 10), number)
        # The answer names the folder, too, but only answered records have it.
        answer = folder if heading == "kind" else f"{folder}s"
        lines += [f"0.png;{folder if heading == 'kind' else 'x'};Which kind ({n})?;{answer}" for n in range(201)]
    (tmp_path / "data" / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    result = run("init", "data", "--base-model", tiny_base)
    data = yaml.safe_load(Path("recipe.yaml").read_text(encoding="utf-8"))["stages"]["instruct"]["data"]
    assert data["columns"]["image"] == image
    reported = "The first images are in 2 directories under the same names"
    assert (reported in said(result)) == (heading == "remark")
    assert data.get("image_root") == (None if heading == "kind" else "data/good")


@pytest.mark.parametrize(
    ("columns", "question"),
    [
        ("image=Bild,question=Frage,answer=Befund", "Frage"),
        ("image=Bild,answer=Befund", {"text": "Which of these does the image show: ja, nein?"}),
        (
            "{image: Bild, question: {text: 'Ist da, oder dort, etwas?'}, answer: Befund}",
            {"text": "Ist da, oder dort, etwas?"},
        ),
    ],
)
def test_headings_that_are_not_known_are_named_by_an_option(
    tmp_path: Path, tiny_base: Path, columns: str, question: object
) -> None:
    lines = ["Patienten-Nr;Bild;Frage;Befund"]
    for number in range(COUNT):
        picture(tmp_path / "bilder" / f"B{number}.png", (12, 10), number)
        lines.append(f"P{number // 2};B{number};Ist Nr. {number} entz\u00fcndet?;{('ja', 'nein')[number % 2]}")
    Path("befunde.csv").write_text("\n".join(lines), encoding="utf-8")
    refused = run("init", "befunde.csv")
    assert refused.exit_code == 1
    assert "Patienten-Nr, Bild, Frage, Befund, and these names do not tell the image, question and answer" in said(
        refused
    )
    assert "By their values, add: --columns image=COLUMN,question=Frage,answer=COLUMN" in said(refused)
    result = run("init", "befunde.csv", "--base-model", tiny_base, "--columns", columns)
    assert result.exit_code == 0, result.output
    data = yaml.safe_load(Path("recipe.yaml").read_text(encoding="utf-8"))["stages"]["instruct"]["data"]
    assert data["columns"] == {"image": "{Bild}.png", "question": question, "answer": "Befund"}
    assert (data["image_root"], data["group"]) == ("./bilder", "Patienten-Nr")


@pytest.mark.parametrize(
    ("columns", "code", "message"),
    [
        ("image=Bild,question=Frage,answer=Wert", 1, "columns: there is no 'Wert'; it has Bild, Frage, Befund"),
        (
            "image=Bild,question=Frage,answer=Befunde",
            1,
            "there is no 'Befunde'; it has Bild, Frage, Befund. Did you mean Befund?",
        ),
        ("image", 2, "write it as image=COLUMN,question=COLUMN,answer=COLUMN"),
        ("picture=Bild,question=Frage,answer=Befund", 2, "--columns.picture: unknown key. There are image"),
        ("imgae=Bild,question=Frage,answer=Befund", 2, "--columns.imgae: unknown key. Did you mean image?"),
        ("image=Bild,question=Frage", 2, "--columns"),
        ("{image: Bild, question: {txt: Was}, answer: Befund}", 2, "--columns.question: must be a column"),
        (
            "{image: Bild, answer",
            2,
            "--columns, line 1: not valid YAML: expected ',' or '}', but got '<stream end>'; write it as in a recipe: "
            "'{image: COLUMN, question: {text:",
        ),
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path: Path, columns: str, code: int, message: str) -> None:
    Path("befunde.csv").write_text("Bild,Frage,Befund\n1.png,Was?,nichts\n", encoding="utf-8")
    result = run("init", "befunde.csv", "--columns", columns)
    assert result.exit_code == code, result.output
    assert message in said(result)
    assert not Path("recipe.yaml").exists()


@pytest.mark.parametrize(("name", "text"), [("a.csv", "image,question,answer\n"), ("a.json", "[]"), ("b.json", "[1]")])
def test_a_file_without_records_says_so(tmp_path: Path, name: str, text: str) -> None:
    Path(name).write_text(text, encoding="utf-8")
    result = run("init", name)
    assert result.exit_code == 1
    assert "records" in said(result)
    assert "no keys" not in said(result)


def test_the_training_split_of_a_saved_data_set_is_taken(tmp_path: Path, tiny_base: Path) -> None:
    rows = [{"question": f"Is {index} even?", "answer": ("yes", "no")[index % 2]} for index in range(COUNT)]
    splits = {"training": Dataset.from_list(rows), "validation": Dataset.from_list(rows[:3])}
    DatasetDict(splits).save_to_disk(tmp_path / "data")
    result = run("init", "data", "--base-model", tiny_base)
    assert result.exit_code == 0, result.output
    data = yaml.safe_load(Path("recipe.yaml").read_text(encoding="utf-8"))["stages"]["instruct"]["data"]
    assert (data["path"], data["split"]) == ("./data", "training")


def test_a_directory_of_other_files_names_them(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "befunde.xls").write_bytes(b"\xd0\xcf\x11\xe0")
    result = run("init", "data")
    assert result.exit_code == 1
    assert "holds no images" in said(result)
    assert "Its files: befunde.xls. What is read: LLaVA JSON, messages with images, a table (CSV," in said(result)
