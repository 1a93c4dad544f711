"""The preflight of data: every image is opened before the first step, and the disk has room for what comes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lora_llava.data.images.headers import header_problem
from lora_llava.data.record import ImageSource
from lora_llava.planning.preflight import disk
from lora_llava.planning.preflight.images import read_images
from lora_llava.planning.preflight.setup import Setup
from lora_llava.recipe.file import load_recipe
from tests.helpers.broken import COMMANDS, Project, command
from tests.helpers.runs import picture


def bad_images(project: Project) -> None:
    """Damage an image that training shows, and one that only a data set for evaluation does."""
    images = project.directory / "images"
    whole = (images / "3.png").read_bytes()
    (images / "3.png").write_bytes(whole[: len(whole) // 2])
    (images / "last.png").write_text("no image", encoding="utf-8")
    records = json.loads((project.directory / "train.json").read_text(encoding="utf-8"))[:1]
    records[0]["image"] = "last.png"
    (project.directory / "test.json").write_text(json.dumps(records), encoding="utf-8")


EVALUATION = "evaluation={data: {path: ./test.json, image_root: images}}"


@pytest.mark.parametrize("decoded", [True, False])
@pytest.mark.parametrize("name", ["finetune", "dry run"])
def test_k16_every_image_of_the_run_is_opened_before_it(
    project: Project, name: str, decoded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not decoded:
        monkeypatch.setattr("lora_llava.planning.preflight.images._DECODED_BYTES", 0)
    bad_images(project)
    result = command(name, project, EVALUATION)
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert lines[0] == "Error: 2 problems found before anything was started:"
    assert lines[1].startswith(
        "  stages.align.data: captions.json, record 4 (id c3), image 3.png: the image is truncated"
    )
    assert lines[2].startswith("  evaluation.data: test.json, record 1 (id q0-0), image last.png: not an image")
    assert not (project.directory / "run").exists()


def test_k16_a_dry_run_refuses_a_key_that_no_record_has(project: Project) -> None:
    settings = "evaluation={data: {path: ./train.json, image_root: images}, by: [patience]}"
    result = command("dry run", project, settings)
    assert result.exit_code != 0
    assert "evaluation.by: no record has the key or column 'patience'" in result.stderr


@pytest.mark.parametrize("name", ["finetune", "dry run"])
def test_k16_questions_that_the_last_template_cannot_ask_are_refused(project: Project, name: str) -> None:
    record = {"id": "t", "conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "yes"}]}
    (project.directory / "test.json").write_text(json.dumps([record]), encoding="utf-8")
    assert command("dry run", project, EVALUATION).exit_code == 0
    result = command(name, project, EVALUATION, "stages.instruct=null")
    assert result.exit_code == 2, result.output
    assert (
        "evaluation.data: test.json, record 1 (id t): template plain takes one image and its caption" in result.stderr
    )
    assert not (project.directory / "run").exists()


def test_k16_check_says_the_same_of_an_image(project: Project) -> None:
    bad_images(project)
    result = command("check", project, EVALUATION)
    assert result.exit_code == 1
    report = json.loads((project.directory / "run" / "check" / "check.json").read_text(encoding="utf-8"))
    problems = [one["problem"] for kind in report["findings"] for one in kind["records"]]
    assert any("image 3.png: the image is truncated" in problem for problem in problems)


def test_k16_the_images_can_be_skipped(project: Project) -> None:
    bad_images(project)
    result = command("dry run", project, EVALUATION, "--skip-image-check")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_k16_a_header_tells_a_whole_image_from_one_cut_off(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    picture(3)[1].resize((200, 300)).save(path, format=kind)
    source = ImageSource("image", path, None)
    assert header_problem(source) is None
    path.write_bytes(path.read_bytes()[:-900])
    assert "truncated" in str(header_problem(source))
    path.write_bytes(b"")
    assert "is empty" in str(header_problem(source))


def test_k16_data_of_later_stages_are_read_before_the_first(project: Project) -> None:
    records = json.loads((project.directory / "train.json").read_text(encoding="utf-8"))
    records[5]["conversations"].pop()
    (project.directory / "train.json").write_text(json.dumps(records), encoding="utf-8")
    result = command("finetune", project)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: stages.instruct.data: train.json, record 6 (id q1-1): ")


def test_a_disk_that_is_too_small_is_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(project.directory)._replace(free=100_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    results = [command(name, project) for name in COMMANDS]
    assert [result.exit_code for result in results] == [2, 2, 2]
    assert len({result.stderr for result in results}) == 1
    assert "GiB are free on the disk" in results[0].stderr
    # Of what is free below a directory that is none for a run, nothing is said.
    refused = command("finetune", project, "output_dir=/proc/x")
    assert "output_dir: /proc/x cannot be created" in refused.stderr
    assert "GiB" not in refused.stderr


def test_an_evaluation_may_hold_a_blank_answer_as_an_open_question(project: Project) -> None:
    record = {"id": "t", "conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": " "}]}
    (project.directory / "test.json").write_text(json.dumps([record]), encoding="utf-8")
    recipe = load_recipe(project.recipe, ["evaluation={data: {path: ./test.json}}"])
    assert read_images(recipe).findings == []


def test_an_evaluation_on_images_of_the_training_is_said(project: Project) -> None:
    records = json.loads((project.directory / "train.json").read_text(encoding="utf-8"))[:1]
    (project.directory / "images" / "new.png").write_bytes((project.directory / "images" / "0.png").read_bytes())
    both = [*records, records[0] | {"id": "new", "image": "new.png"}]
    (project.directory / "test.json").write_text(json.dumps(both), encoding="utf-8")
    said = "evaluation.data: 1 of 2 images is in the training data too, so the score is better than on new images"
    assert [str(finding) for finding in read_images(load_recipe(project.recipe, [EVALUATION])).findings] == [said]
    (project.directory / "test.json").write_text(json.dumps(both[1:]), encoding="utf-8")
    assert read_images(load_recipe(project.recipe, [EVALUATION])).findings == []


def test_the_features_of_all_sources_need_room(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup.of(load_recipe(project.recipe, ["stages.instruct.cache_image_features=disk"]), "new", None)
    setup.sound = True
    counts = {"stages.instruct.data": 2, "stages.instruct.data.1": 3, "stages.instruct.data.1.validation": 4}
    others = {"stages.align.data": 50, "evaluation.data": 60}
    needed = []
    monkeypatch.setattr(disk, "_missing_room", lambda _, parts, __: needed.append(parts) or ())
    list(disk.room_for_features(setup, counts | others))
    list(disk.room_for_features(setup, {"stages.instruct.data": 1}))
    assert needed[0]["features of instruct"] == 9 * needed[1]["features of instruct"]
