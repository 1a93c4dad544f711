"""`lora-llava check --fix`: the cleaned data have no finding that needs no judgment, and nothing else changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from lora_llava.data.load import load_records
from lora_llava.doctor.fix import FIXES, RECIPE
from lora_llava.recipe.file import load_recipe
from tests.helpers.faulty import entry, plant, sound_data, write_recipe
from tests.unit.doctor.test_doctor import check, found_in, report_in


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_needs_no_judgment_is_gone_and_all_else_stays(tiny_base: Path, tmp_path: Path) -> None:
    images, train, tested = sound_data()
    plant(images, train, tested)
    train.append(train[0] | {"id": "twice"})
    named = entry("named", "3.JPEG", "What does it name?", "a name")
    greeting = {"from": "gpt", "value": "Hello!"}
    greeted = entry("greeted", "4.png", "What does it say?", "a word", "of 4.png")
    greeted["conversations"].insert(0, greeting)
    train += [named, greeted]
    recipe = write_recipe(tmp_path, tiny_base, images, train, tested)
    result = check(str(recipe), "--fix", str(tmp_path / "clean"))
    assert result.exit_code == 1, "the checked data have errors"
    report = report_in(tmp_path / "run" / "check")
    bad = {one["id"] for finding in report["findings"] if finding["severity"] == "error" for one in finding["records"]}

    # Every record that is no error and no duplicate is there, in order, with all keys.
    kept = lines(tmp_path / "clean/instruct.jsonl")
    corrected = {
        "named": named | {"image": "3.png"},
        "greeted": entry("greeted", "4.png", "What does it say?", "a word"),
    }
    expected = [corrected.get(one["id"], one) for one in train if one["id"] not in bad | {"twice"}]
    assert kept == expected
    fixes = json.loads((tmp_path / "clean" / FIXES).read_text(encoding="utf-8"))
    of_train = fixes["sources"][0]
    assert of_train["file"] == "instruct.jsonl"
    assert of_train["records"] == len(kept)
    assert of_train["corrected"] == {"first turns of the model": 1, "extensions": 1}
    assert of_train["dropped"]["duplicate_record"] == 1
    assert len(of_train["records_dropped"]) == len(train) - len(kept)
    assert "instruct: " in result.output
    assert "1 duplicate_record dropped" in result.output

    # What takes judgment is named, and is all that is left.
    again = check(str(tmp_path / "clean" / RECIPE), "--output", str(tmp_path / "again"))
    after = report_in(tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert {kind for kind, _, _ in found_in(after)} == {finding["kind"] for finding in fixes["left"]}
    assert "contradiction" in {finding["kind"] for finding in fixes["left"]}
    before = load_recipe(recipe)
    assert (
        load_recipe(tmp_path / "clean" / RECIPE).stage("instruct").learning_rate
        == before.stage("instruct").learning_rate
    )
    assert load_recipe(tmp_path / "clean" / RECIPE).resolved_output_dir == before.resolved_output_dir


def test_sound_data_are_left_where_they_are(tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, *sound_data())
    result = check(str(recipe), "--fix", str(tmp_path / "clean"))
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "clean").iterdir()) == [FIXES, RECIPE]
    assert "instruct: nothing to correct" in result.output
    clean = load_recipe(tmp_path / "clean" / RECIPE)
    assert clean.stage("instruct").data == load_recipe(recipe).stage("instruct").data


def test_an_existing_directory_is_not_touched(tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, *sound_data())
    (tmp_path / "clean").mkdir()
    result = check(str(recipe), "--fix", str(tmp_path / "clean"))
    assert result.exit_code == 1
    assert "clean already exists and is not overwritten" in result.output
    assert not (tmp_path / "run" / "check").exists(), "before an hour of checking"


def recipe_over(directory: Path, base: Path, data: dict[str, Any]) -> Path:
    path = write_recipe(directory, base, *sound_data())
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["stages"]["instruct"]["data"] = data
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


QA = {"image": "image", "question": "question", "answer": "answer"}


def test_a_table_is_written_as_json_lines_with_all_columns(tiny_base: Path, tmp_path: Path) -> None:
    table = "image;question;answer;patient\n0.png;What?;a;7\ngone.png;What?;b;8\n1.PNG;Why?;1.50;9\n0.png;What?;A;7\n"
    (tmp_path / "t.csv").write_text(table, encoding="utf-8")
    recipe = recipe_over(tmp_path, tiny_base, {"path": "t.csv", "image_root": "images", "columns": QA})
    result = check(str(recipe), "--fix", str(tmp_path / "clean"))
    assert lines(tmp_path / "clean/instruct.jsonl") == [
        {"image": "0.png", "question": "What?", "answer": "a", "patient": "7"},
        {"image": "1.png", "question": "Why?", "answer": "1.50", "patient": "9"},
    ], result.output
    records = load_records(load_recipe(tmp_path / "clean" / RECIPE).stage("instruct").data)
    assert [record.turns[1].text for record in records] == ["a", "1.50"]


@pytest.fixture
def parquet(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    images, _, _ = sound_data()
    rows = [
        {"image": {"bytes": images[f"{n % 4}.png"], "path": None}, "question": "What?", "answer": "a"} for n in range(6)
    ]
    rows[2]["image"] = {"bytes": b"no image", "path": None}
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "t.parquet")
    return recipe_over(tmp_path, tiny_base, {"path": "t.parquet", "columns": QA})


def test_images_in_parquet_are_not_copied_but_left_out(parquet: Path, tmp_path: Path) -> None:
    result = check(str(parquet), "--fix", str(tmp_path / "clean"))
    left_out = {(one["record"], one["kind"]) for one in lines(tmp_path / "clean/instruct.exclude.jsonl")}
    assert left_out == {(3, "bad_image"), (5, "duplicate_record"), (6, "duplicate_record")}, result.output
    clean = load_recipe(tmp_path / "clean" / RECIPE).stage("instruct").data
    assert clean.path == str(tmp_path / "t.parquet")
    assert [record.number for record in load_records(clean)] == [1, 2, 4]
    # A second time, what is left out stays left out.
    second = check(
        str(tmp_path / "clean" / RECIPE), "stages.instruct.data.max_records=2", "--fix", str(tmp_path / "two")
    )
    assert "instruct: nothing to correct" in second.output


def test_a_validation_file_is_cleaned_with_its_training_file(tiny_base: Path, tmp_path: Path) -> None:
    images, train, tested = sound_data()
    held_out = [*tested[:3], entry("gone", "gone.png", "What?", "a")]
    (tmp_path / "held.json").write_text(json.dumps(held_out), encoding="utf-8")
    recipe = write_recipe(tmp_path, tiny_base, images, train, tested[12:], validation={"path": "held.json"})
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    del content["evaluation"]
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    result = check(str(recipe), "--fix", str(tmp_path / "clean"))
    assert lines(tmp_path / "clean/instruct.validation.jsonl") == tested[:3], result.output
    again = check(str(tmp_path / "clean" / RECIPE), "--output", str(tmp_path / "again"))
    assert again.exit_code == 0, again.output


def test_every_source_of_a_list_is_cleaned_by_its_own_list(tiny_base: Path, tmp_path: Path) -> None:
    images, train, tested = sound_data()
    gone = entry("gone", "gone.png", "What?", "a")
    leak = entry("leak", "0.png", "Why?", "because")
    (tmp_path / "more.json").write_text(json.dumps([*tested[:3], gone]), encoding="utf-8")
    (tmp_path / "held.json").write_text(json.dumps([*tested[3:6], gone, leak]), encoding="utf-8")
    recipe = write_recipe(tmp_path, tiny_base, images, train, tested[12:])
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    instruct = content["stages"]["instruct"]
    more = {"path": "more.json", "image_root": "images", "validation": {"path": "held.json"}}
    instruct["data"] = [instruct["data"], more]
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")

    result = check(str(recipe), "--fix", str(tmp_path / "clean"))
    assert lines(tmp_path / "clean/instruct.1.jsonl") == tested[:3], result.output
    assert lines(tmp_path / "clean/instruct.1.validation.jsonl") == [*tested[3:6], leak]
    clean = load_recipe(tmp_path / "clean" / RECIPE).stage("instruct").data
    assert [Path(source.path).name for source in clean.sources] == ["train.json", "instruct.1.jsonl"]
    # What one source holds out and the other trains on takes judgment, and stops a run.
    again = check(str(tmp_path / "clean" / RECIPE), "--output", str(tmp_path / "again"))
    assert again.exit_code == 1, again.output
    assert "1 error," in again.output

    # An override cannot name a source of a list, so the advice is about the recipe.
    bad = tmp_path / "run/check/bad_records"
    said = "1 bad record can be left out with exclude: {} in {}source 2 of stages.instruct.data in the recipe"
    assert said.format(bad / "instruct.1.jsonl", "") in result.output
    assert said.format(bad / "instruct.1.validation.jsonl", "the validation of ") in result.output
    findings = json.loads((tmp_path / "run/check/check.json").read_text(encoding="utf-8"))["findings"]
    [leaks] = [kind["records"] for kind in findings if kind["kind"] == "source_leak"]
    assert [(one["source"], one["data"], one["id"]) for one in leaks] == [
        ("instruct.1.validation", "held.json", "leak")
    ]


def test_half_of_a_surrogate_pair_in_a_key_that_is_not_read_is_written_as_it_was(
    tiny_base: Path, tmp_path: Path
) -> None:
    images, train, tested = sound_data()
    train[0]["note"] = "\ud83d"
    train += [train[1]]
    recipe = write_recipe(tmp_path, tiny_base, images, train, tested)
    result = check(str(recipe), "--fix", str(tmp_path / "clean"))
    assert result.exit_code == 0, result.output
    assert lines(tmp_path / "clean/instruct.jsonl") == train[:-1]
