"""Every setting, changed alone when a run is resumed, is used or refused by its name; the types are walked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from rich.console import Console

import lora_llava.training.train as train_module
from lora_llava.errors import LoraLlavaError, TrainingError
from lora_llava.recipe.fields import OnResume, settings_of
from lora_llava.recipe.file import load_recipe
from lora_llava.recipe.settings import Recipe
from lora_llava.run_directory import output
from lora_llava.training.run import run_recipe
from tests.helpers.resuming import SETTINGS, train
from tests.helpers.settings import other_values

EVALUATION = "evaluation={data: {path: %s, image_root: %s, max_records: 6}, max_new_tokens: 2, batch_size: 6}"
NOTES = {one.key: one.on_resume for one in settings_of(Recipe)}
USED = {OnResume.FREE, OnResume.AGAIN, OnResume.CARD}
"""Taken up by a stage that is not finished."""
USED_IF_FINISHED = {OnResume.AGAIN, OnResume.CARD}


class Reached(BaseException):
    """The run would go on: all that it refuses, it has refused."""


@pytest.fixture(scope="module")
def whole(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finished") / "run"
    train(project, directory)
    return directory


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a run before its model is loaded."""

    def reached(*_: Any) -> None:
        raise Reached

    monkeypatch.setattr(train_module, "_build_model", reached)


def refusal(project: Path, directory: Path, override: str, *, overrides: tuple[str, ...] = SETTINGS) -> str | None:
    """Resume with one setting changed; return the error, or None if it is accepted."""
    try:
        recipe = load_recipe(project, (*overrides, f"output_dir={directory}", override))
        run_recipe(recipe, Console(quiet=True), resume="exact")
    except Reached:
        return None
    except LoraLlavaError as error:
        return str(error)
    return None


def named(error: str, key: str) -> bool:
    """Tell whether a refusal names the key, or the value that it leads to in the data."""
    last = key.rpartition(".")[2]
    # A path or a name that leads nowhere is named by itself.
    return any(one in error for one in (key, f"{last}:", f"{last} ", "other", "train.json")) or (
        ".data" in key and ".data" in error
    )


def others(project: Path) -> dict[str, str]:
    found = other_values(project, *SETTINGS)
    # Another directory holds no run; the name of the format's version has one value.
    return {key: override for key, override in found.items() if key not in ("output_dir", "version")}


def test_k36_every_setting_changed_alone_on_an_unfinished_run(project: Path, broken_off: Path, checked: None) -> None:
    kept = (broken_off / "recipe.yaml").read_bytes()
    seen, wrong = set(), {}
    for key, override in others(project).items():
        (broken_off / "recipe.yaml").write_bytes(kept)
        error = refusal(project, broken_off, override)
        note = NOTES[key]
        seen.add(note)
        # The first stage of this run is finished, the second is not.
        used = USED_IF_FINISHED if key.startswith("stages.align.") else USED
        if error is None and note not in used | {OnResume.SAME_CONTENT, OnResume.RESOLVED}:
            wrong[override] = "is accepted, and not used"
        elif error is not None and (not named(error, key) or (note in used and "has no effect" not in error)):
            wrong[override] = error
    assert not wrong
    assert seen >= set(OnResume) - {OnResume.AGAIN}


def test_k36_every_setting_changed_alone_on_a_finished_run(
    project: Path, whole: Path, tmp_path: Path, checked: None
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    kept, wrong = (run / "recipe.yaml").read_bytes(), {}
    for key, override in others(project).items():
        error = refusal(project, run, override)
        note = NOTES[key]
        if error is None and note not in USED_IF_FINISHED | {OnResume.SAME_CONTENT}:
            wrong[override] = "is accepted, and not used"
        elif error is not None and (note in USED_IF_FINISHED or not named(error, key)):
            wrong[override] = error
        assert error is None or (run / "recipe.yaml").read_bytes() == kept
        (run / "recipe.yaml").write_bytes(kept)
    assert not wrong


def test_k36_more_data_on_a_finished_run_are_refused_with_the_way_to_use_them(
    project: Path, whole: Path, tmp_path: Path, checked: None
) -> None:
    records = json.loads((project.parent / "train.json").read_text(encoding="utf-8"))
    more = [*records, {**records[0], "id": "more"}]
    (tmp_path / "more.json").write_text(json.dumps(more), encoding="utf-8")
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    error = refusal(project, run, f"stages.instruct.data.path={tmp_path / 'more.json'}")
    assert error is not None
    assert "stage instruct has changed since" in error
    assert "The stage is finished, so these have no effect" in error
    assert "stages.instruct.data.path: " in error
    assert "start_from=" in error
    # The same records elsewhere are the same records.
    shutil.copy(project.parent / "train.json", tmp_path / "same.json")
    assert refusal(project, run, f"stages.instruct.data.path={tmp_path / 'same.json'}") is None


def test_k36_a_changed_caption_and_changed_pixels_of_a_finished_stage_are_seen(
    project: Path, whole: Path, tmp_path: Path, checked: None
) -> None:
    data = Path(shutil.copytree(project.parent, tmp_path / "data", ignore=shutil.ignore_patterns("run*")))
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    path = data / project.name
    assert refusal(path, run, "stages.align.data.split=train") is None
    captions = (data / "captions.json").read_text(encoding="utf-8")
    (data / "captions.json").write_text(captions.replace("a red thing", "a red thin"), encoding="utf-8")
    error = refusal(path, run, "stages.align.data.split=train")
    assert error is not None
    assert "stages.align.data (sha256 of the records)" in error
    (data / "captions.json").write_text(captions, encoding="utf-8")
    image = data / "images/3.png"
    Image.new("RGB", (30, 30), (1, 2, 3)).save(image)
    error = refusal(path, run, "stages.align.data.split=train")
    assert error is not None
    assert "stages.align.data (images): 12 files" in error


def test_k36_data_of_a_finished_stage_that_are_gone_are_not_needed(
    project: Path, whole: Path, tmp_path: Path, checked: None
) -> None:
    data = Path(shutil.copytree(project.parent, tmp_path / "data", ignore=shutil.ignore_patterns("run*")))
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    recipe = load_recipe(data / project.name, (*SETTINGS, f"output_dir={run}"))
    text = (run / "align" / "recipe.yaml").read_text(encoding="utf-8")
    stored = yaml.safe_load(text)
    stored["stages"]["align"]["data"]["path"] = str(data / "captions.json")
    stored["stages"]["align"]["data"]["image_root"] = str(data / "images")
    (run / "align" / "recipe.yaml").write_text(yaml.safe_dump(stored), encoding="utf-8")
    (data / "captions.json").unlink()
    run_recipe(recipe, Console(quiet=True), resume="exact")


def test_k36_resumed_anyway_a_finished_stage_states_what_was_done(
    project: Path, whole: Path, tmp_path: Path, checked: None
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    rate = "stages.instruct.learning_rate=0.5"
    recipe = load_recipe(project, (*SETTINGS, f"output_dir={run}", rate, "card.limits=Few"))
    run_recipe(recipe, Console(quiet=True), resume="anyway")
    stated = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    assert stated["stages"]["instruct"]["learning_rate"] == 0.005
    card = yaml.safe_load((run / "instruct/recipe.yaml").read_text(encoding="utf-8"))["card"]
    assert (stated["card"]["limits"], card["limits"]) == ("Few", "Few")


def test_k36_stages_cannot_be_taken_out_of_a_run(project: Path, whole: Path, tmp_path: Path, checked: None) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    for stage in ("align", "instruct"):
        error = refusal(project, run, f"stages.{stage}=null")
        assert error is not None
        assert "stages: align, instruct then, " in error


def test_k36_an_evaluation_whose_settings_or_data_changed_is_made_again(
    project: Path, whole: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    data, images = project.parent / "train.json", project.parent / "images"
    first = EVALUATION % (data, images)
    summary, _ = train(project, run, first, resume="exact")
    made = summary["evaluation"]
    assert yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["evaluation"]["max_new_tokens"] == 2
    _, shown = train(project, run, first, resume="exact")
    assert "made again" not in shown
    changed = first.replace("max_records: 6", "max_records: 4")
    summary, shown = train(project, run, changed, resume="exact")
    assert "evaluation: made again, because of a change in evaluation.data.max_records" in shown
    assert summary["evaluation"] != made
    records = json.loads(data.read_text(encoding="utf-8"))
    records[0]["conversations"][1]["value"] = "something else"
    (tmp_path / "other.json").write_text(json.dumps(records), encoding="utf-8")
    elsewhere = changed.replace(str(data), str(tmp_path / "other.json"))
    _, shown = train(project, run, elsewhere, resume="exact")
    assert "evaluation.data (sha256 of the records)" in shown
    shutil.copy(tmp_path / "other.json", tmp_path / "copy.json")
    _, shown = train(project, run, elsewhere.replace("other.json", "copy.json"), resume="exact")
    assert "made again" not in shown


def test_k36_parts_of_a_base_and_its_projector_are_those_it_was_assembled_from(
    project: Path, whole: Path, tmp_path: Path, checked: None
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    parts = "base={language_model: ./lm, vision_tower: ./tower}"
    recipe = load_recipe(project, (*SETTINGS, f"output_dir={run}", parts))
    output.write_recipe(run, recipe)
    changes = {
        "projector_init": "embeddings", "mm_projector_type": "linear", "vision_feature_layer": "-1",
        "vision_feature_select_strategy": "full", "language_model": "./other", "vision_tower": "./other",
    }  # fmt: skip
    for name, value in changes.items():
        changed = load_recipe(project, (*SETTINGS, f"output_dir={run}", parts, f"base.{name}={value}"))
        with pytest.raises(TrainingError, match=rf"is a run of another recipe:\n  base\.{name}: .* then, .* now\n"):
            run_recipe(changed, Console(quiet=True), resume="anyway")
    with pytest.raises(TrainingError, match="seed: 42 then, 7 now"):
        run_recipe(load_recipe(project, (*SETTINGS, f"output_dir={run}", parts, "seed=7")), Console(), resume="anyway")
