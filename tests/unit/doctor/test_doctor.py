"""`lora-llava check`: every planted fault is found and named, nothing else is, and the report is safe to open."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from lora_llava.cli import cli
from lora_llava.doctor.catalogue import KINDS
from tests.helpers.faulty import encoded, entry, plant, scene, sound_data, write_recipe
from tests.helpers.pairs import write_preference_project


def check(*args: str) -> Result:
    return CliRunner().invoke(cli, ["check", *args, "--workers", "1"])


def report_in(directory: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((directory / "check.json").read_text(encoding="utf-8"))
    return made


def found_in(report: dict[str, Any]) -> set[tuple[str, str, str]]:
    return {(kind["kind"], one["source"], str(one["id"])) for kind in report["findings"] for one in kind["records"]}


@pytest.fixture(scope="module")
def faulty(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[tuple[str, str, str]], Result]:
    """A recipe over data with planted faults, what was planted, and what check said."""
    directory = tmp_path_factory.mktemp("faulty")
    data = sound_data()
    planted = plant(*data)
    recipe = write_recipe(directory, tiny_base, *data, group="patient")
    return recipe, planted, check(str(recipe))


@pytest.mark.fault("images: missing files")
@pytest.mark.fault("images: a truncated JPEG")
@pytest.mark.fault("images: an empty file")
@pytest.mark.fault("images: a web page saved as .jpg")
@pytest.mark.fault("images: URLs")
@pytest.mark.fault("records: an answer that is empty or blank")
@pytest.mark.fault("records: a conversation that is too long: truncated, but never inside the image, never to nothing")
@pytest.mark.fault("records: duplicate ids; images or groups in both training and validation")
def test_all_planted_faults_are_found_and_named(faulty: tuple[Path, list[tuple[str, str, str]], Result]) -> None:
    recipe, planted, result = faulty
    report = report_in(recipe.parent / "run" / "check")
    assert len(planted) == 25
    assert len({kind for kind, _, _ in planted}) == 12
    assert found_in(report) == set(planted)
    for kind in report["findings"]:
        for one in kind["records"]:
            assert one["data"] in ("train.json", "test.json")
            assert str(one["record"]) in one["problem"]
    errors = sum(KINDS[kind].severity == "error" for kind, _, _ in planted)
    assert report["counts"]["error"] == errors
    assert result.exit_code == 1, result.output
    assert f"{errors} errors" in result.output
    for kind in {kind for kind, _, _ in planted}:
        assert KINDS[kind].title in result.output


def test_what_is_excluded_is_no_error_any_more(faulty: tuple[Path, list[tuple[str, str, str]], Result]) -> None:
    recipe, planted, _ = faulty
    report = report_in(recipe.parent / "run" / "check")
    [(key, entry_)] = report["exclude"].items()
    assert key == "stages.instruct.data.exclude"
    excluded = sum(part == "instruct" and KINDS[kind].severity == "error" for kind, part, _ in planted)
    assert entry_ == {"file": "bad_records/instruct.jsonl", "records": excluded}
    bad = recipe.parent / "run" / "check" / entry_["file"]
    output = recipe.parent / "second"
    settings = [f"{key}={bad}", "stages.instruct.data.group=null", "evaluation.data.group=null"]
    result = check(str(recipe), *settings, "--output", str(output))
    assert result.exit_code == 0, result.output
    after = report_in(output)
    assert after["counts"]["error"] == 0
    assert after["exclude"] == {}
    assert after["counts"]["warning"] == report["counts"]["warning"]


def test_the_page_shows_pictures_and_runs_nothing(faulty: tuple[Path, list[tuple[str, str, str]], Result]) -> None:
    recipe, _, _ = faulty
    page = (recipe.parent / "run" / "check" / "check.html").read_text(encoding="utf-8")
    assert re.search(r"share saved by packing</td><td[^>]*>\d+%<", page)
    assert "<script" not in page.lower()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "default-src 'none'" in page
    sources = re.findall(r'(?:src|href|action|data)="([^"]*)"', page)
    assert len(sources) > 15
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"url\(|@import|<link|<iframe|<form|javascript:|\son\w+=", page)
    assert page.count('class="card sample"') == 10
    for words in (
        "Near duplicates in both training and test",
        "What to do",
        "Tokens of a conversation",
        "optimizer steps",
    ):
        assert words in page


def test_no_path_of_the_machine_is_in_the_report(faulty: tuple[Path, list[tuple[str, str, str]], Result]) -> None:
    recipe, _, _ = faulty
    for path in (recipe.parent / "run" / "check").rglob("*"):
        assert path.is_dir() or str(recipe.parent) not in path.read_text(encoding="utf-8"), path.name


def test_sound_data_have_no_finding(tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, *sound_data())
    result = check(str(recipe))
    assert result.exit_code == 0, result.output
    report = report_in(tmp_path / "run" / "check")
    assert report["findings"] == []
    assert report["plans"]["instruct"]["optimizer_steps"] == 60
    assert report["plans"]["instruct"]["conversations"] == 24
    assert report["sides"]["instruct training"]["images"] == 8
    assert sum(bar["count"] for bar in report["sides"]["evaluation"]["tokens"]) == 24
    assert not (tmp_path / "run" / "check" / "bad_records").exists()


def test_k63_without_the_base_check_is_refused_as_a_run_is(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "./nowhere", *sound_data())
    result = check(str(recipe))
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: base.model_name_or_path: ")
    assert "nowhere does not exist" in result.stderr
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be_read_are_one_finding(tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, *sound_data())
    (tmp_path / "test.json").write_text("[{]", encoding="utf-8")
    result = check(str(recipe))
    assert result.exit_code == 1
    [kind] = report_in(tmp_path / "run" / "check")["findings"]
    assert kind["kind"] == "data_file"
    assert "test.json: line 1, column 3: not valid JSON" in kind["records"][0]["problem"]
    (tmp_path / "test.json").unlink()
    result = check(str(recipe))
    assert result.exit_code == 2
    assert "evaluation.data.path: " in result.stderr
    assert "test.json does not exist" in result.stderr


def test_a_share_is_drawn_by_group_and_images_leak_to_neither_side(tiny_base: Path, tmp_path: Path) -> None:
    images, train, tested = sound_data()
    for number, one in enumerate(train):
        one["patient"] = f"p{number // 6}"
    recipe = write_recipe(tmp_path, tiny_base, images, train, tested)
    share = ["stages.instruct.data.validation={share: 0.3}", "stages.instruct.data.group=patient"]
    assert check(str(recipe), *share).exit_code == 0
    sides = report_in(tmp_path / "run" / "check")["sides"]
    assert (sides["instruct training"]["records"], sides["instruct validation"]["records"]) == (18, 6)


def test_notes_on_duplicates_transparency_and_unanswered_questions(tiny_base: Path, tmp_path: Path) -> None:
    images, train, tested = sound_data()
    glass = scene(70).convert("RGBA")
    glass.putalpha(10)
    images |= {"twin.png": images["2.png"], "glass.png": encoded(glass)}
    train += [
        train[0] | {"id": "again"},
        entry("twin", "twin.png", "Which?", "this"),
        entry("g", "glass.png", "Q", "A"),
    ]
    tested[3]["conversations"] = tested[3]["conversations"][:1]
    recipe = write_recipe(tmp_path, tiny_base, images, train, tested)
    assert check(str(recipe)).exit_code == 0
    assert found_in(report_in(tmp_path / "run" / "check")) == {
        ("duplicate_record", "instruct", "again"),
        ("duplicate_image", "instruct", "twin"),
        ("transparent", "instruct", "g"),
        ("no_answer", "evaluation", tested[3]["id"]),
    }


def test_merged_turns_are_planned_as_a_run_does(tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, *sound_data())
    assert check(str(recipe), "stages.instruct.data.merge_turns=3").exit_code == 0
    assert report_in(tmp_path / "run" / "check")["plans"]["instruct"]["conversations"] == 8


def test_k12_k13_references_that_no_answer_can_equal_are_found(tiny_base: Path, tmp_path: Path) -> None:
    images, train, tested = sound_data()
    for number, answer in enumerate(["?", "one two three four five six seven eight nine ten", "A", " "]):
        tested[number]["conversations"][1]["value"] = answer
    tested[4]["conversations"].append({"from": "human", "value": "and why?"})
    recipe = write_recipe(tmp_path, tiny_base, images, train, tested)
    for metric, void in (("exact_match", {0}), ("vqa_v2", {0, 2})):
        result = check(str(recipe), f"evaluation.metric={metric}")
        assert result.exit_code == 0, result.output
        assert found_in(report_in(tmp_path / "run" / "check")) == {
            *(("void_reference", "evaluation", tested[number]["id"]) for number in void),
            ("long_reference", "evaluation", tested[1]["id"]),
            ("no_answer", "evaluation", tested[3]["id"]),
            ("no_answer", "evaluation", tested[4]["id"]),
        }


def test_k38_a_key_that_no_test_record_has_is_found(tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, *sound_data())
    assert check(str(recipe), "evaluation.by=[patient]").exit_code == 0
    assert check(str(recipe), "evaluation.by=[patiet]").exit_code == 1
    [found] = report_in(tmp_path / "run" / "check")["findings"]
    assert found["title"] == "Keys that no record has"
    assert "Did you mean patient?" in found["records"][0]["problem"]


def test_k14_blank_pictures_and_lost_shades_are_found_with_their_pictures(tiny_base: Path, tmp_path: Path) -> None:
    images, train, tested = sound_data()
    scan = np.linspace(0, 4000, 32 * 32).astype(np.uint16).reshape(32, 32)
    hot = scan.copy()
    hot[0, :10] = np.linspace(65_000, 65_535, 10)
    mask = np.where(scan > 2000, np.uint16(65535), np.uint16(0))
    made = {"black": np.zeros((8, 8), np.uint8), "white": np.full((8, 8), 255, np.uint8), "flat": scan * 0 + 777}
    marked = scan // 200
    marked[0, 0] = 65_535
    made |= {"scan": scan, "hot": hot, "mask": mask, "marked": marked, "small": mask // 65535, "step": mask // 16 + 1}
    made |= {"dim": (mask // 65535).astype(np.uint8)}
    for name, values in made.items():
        images[f"{name}.png"] = encoded(Image.fromarray(values))
        train.append(entry(name, f"{name}.png", "What?", "something"))
    deep = encoded(Image.new("RGB", (8, 8), (9, 9, 9)))
    images["plain8.png"] = deep
    train.append(entry("plain8", "plain8.png", "What?", "a thing"))
    recipe = write_recipe(tmp_path, tiny_base, images, train, tested)
    result = check(str(recipe))
    assert result.exit_code == 0, result.output
    report = report_in(tmp_path / "run" / "check")
    found = {(kind, name) for kind, _, name in found_in(report) if kind in ("blank_image", "few_levels")}
    assert found == {
        *(("blank_image", name) for name in ("black", "white", "flat", "plain8", "dim")),
        ("few_levels", "hot"),
    }
    assert "white.png is all white" in result.output
    assert "dim.png has values at most 1 of 255 apart" in " ".join(
        one["problem"] for finding in report["findings"] for one in finding["records"]
    )
    page = (tmp_path / "run" / "check" / "check.html").read_text(encoding="utf-8")
    assert re.search(r"hot\.png keeps 1\d shades in the 8 bits that are seen", page)
    window = ["stages.instruct.data.window=[0, 4095]", "evaluation.data.window=[0, 4095]"]
    assert check(str(recipe), *window).exit_code == 0
    left = {name for kind, _, name in found_in(report_in(tmp_path / "run" / "check")) if kind == "few_levels"}
    assert left == {"marked"}, "the window fits the scans, not the picture of 20 levels"


def test_records_that_all_fail_alike_are_one_finding(tiny_base: Path, tmp_path: Path) -> None:
    images, train, tested = sound_data()
    flat = [{"Image": one["image"], "PatientID": 7, "Question": "Q", "Answer": "A"} for one in train]
    flat[3]["note"] = "x"
    recipe = write_recipe(tmp_path, tiny_base, images, flat, tested)
    result = check(str(recipe))
    assert result.exit_code == 1
    [kind] = [one for one in report_in(tmp_path / "run" / "check")["findings"] if one["kind"] == "form"]
    assert (kind["count"], len(kind["records"])) == (24, 1)
    output = " ".join(result.output.split())
    assert "train.json: Every record has the wrong form: this is not LLaVA JSON. The first: conversations: is" in output
    assert "it has Image, PatientID, Question, Answer." in output
    assert "columns: {image: Image, question: Question, answer: Answer}" in output
    assert "instruct: Nothing to train on: no record could be read." in output
    assert "24 errors" in output
    assert "exclude=" not in output, "a list of all records is of no use"
    empty = [one | {"conversations": [one["conversations"][0], {"from": "gpt", "value": " "}]} for one in train[:-1]]
    recipe = write_recipe(tmp_path, tiny_base, images, [*empty, train[-1]], tested)
    assert "Nearly every record (23) fails in the same way. The first: turn 2: the answer is empty" in " ".join(
        check(str(recipe)).output.split()
    )


def test_pairs_without_a_difference_and_answers_of_unlike_length_are_found(tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_preference_project(tmp_path, tiny_base)
    pairs = json.loads((tmp_path / "pairs.json").read_text(encoding="utf-8"))
    assert len(pairs) == 26
    pairs[0]["rejected"] = pairs[0]["conversations"][1]["value"]
    del pairs[1]["rejected"]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    result = check(str(recipe), "stages.prefer.data.validation=null")
    report = report_in(tmp_path / "run" / "check")
    kinds = {kind["kind"]: kind["records"] for kind in report["findings"]}
    assert [one["record"] for one in kinds["pair"]] == [1, 2]
    assert result.exit_code == 1
    assert "length_bias" not in kinds

    for entry_ in pairs:
        entry_["rejected"] = "no"
        entry_["conversations"][1]["value"] = "a longer answer"
    (tmp_path / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    check(str(recipe), "stages.prefer.data.validation=null")
    [bias] = [one for one in report_in(tmp_path / "run" / "check")["findings"] if one["kind"] == "length_bias"]
    [found] = bias["records"]
    assert "the chosen answer is longer in 26 of 26 pairs; the means are 15 and 2 characters" in found["problem"]


def test_duplicates_of_any_record_are_found_with_merged_turns_too(tiny_base: Path, tmp_path: Path) -> None:
    images, train, tested = sound_data()
    train = [{**one, "id": str(number)} for number, one in enumerate(train, start=1)]
    asked = ["".join(f"{word} " for word in ["A dog that runs over the grass and catches a", thing]) for thing in "xy"]
    train += [entry(str(one), "0.png", "Describe it.", asked[which]) for one, which in ((40, 0), (41, 1), (42, 1))]
    # Ids of a second file that was appended to the first, which numbers its records from 1, too.
    train.append(entry("1", "1.png", "And this?", "blue"))
    tested[0]["image"] = tested[1]["image"]
    recipe = write_recipe(tmp_path, tiny_base, images, train, tested)
    distinct = len({one["conversations"][1]["value"].strip() for one in train})
    assert check(str(recipe), "stages.instruct.data.merge_turns=3").exit_code == 0
    report = report_in(tmp_path / "run" / "check")
    assert found_in(report) == {("duplicate_record", "instruct", "42"), ("duplicate_id", "instruct", "1")}
    figures = report["sides"]["instruct training"]
    assert (figures["records"], figures["different_answers"]) == (len(train), distinct)
