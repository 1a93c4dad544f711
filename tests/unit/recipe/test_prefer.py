"""Settings of stage `prefer`, and what it inherits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_llava.errors import RecipeError
from lora_llava.planning.preflight.setup import Setup
from lora_llava.planning.preflight.start_from import preference_has_a_start
from lora_llava.recipe.file import load_recipe
from lora_llava.recipe.settings import Recipe

DATA = {"data": {"path": "train.json"}}
PARTS = {"language_model": "some/llama", "vision_tower": "some/clip"}


def load(directory: Path, stages: dict[str, Any], **settings: Any) -> Recipe:
    path = directory / "recipe.yaml"
    recipe = {"name": "small", "base": {"model_name_or_path": "some/llava"}, "stages": stages, **settings}
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return load_recipe(path)


def artifact(directory: Path, stage: str) -> Path:
    """Files of an artifact that a recipe reads."""
    directory.mkdir()
    manifest = {"stage": stage, "template": {"name": "chatml", "system": "Answer."}, "images": {"window": [0.0, 9.0]}}
    (directory / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    config = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def test_it_comes_last_and_takes_over_the_format_of_instruct(tmp_path: Path) -> None:
    instruct = {"data": {"path": "train.json", "window": [0.0, 9.0]}, "template": "chatml", "system": "Answer."}
    recipe = load(tmp_path, {"prefer": DATA, "instruct": instruct | {"image_aspect_ratio": "square"}})
    assert recipe.stage_names == ["instruct", "prefer"]
    prefer = recipe.stage("prefer")
    assert (prefer.template, prefer.system, prefer.image_aspect_ratio) == ("chatml", "Answer.", "square")
    assert prefer.data.window == [0.0, 9.0]
    own = load(tmp_path, {"prefer": {**DATA, "template": "vicuna_v1"}, "instruct": instruct}).stage("prefer")
    assert (own.template, own.system) == ("vicuna_v1", None)


def test_it_takes_over_lora_and_format_of_an_artifact_of_instruct(tmp_path: Path) -> None:
    start = artifact(tmp_path / "start", "instruct")
    recipe = load(tmp_path, {"prefer": DATA}, start_from=str(start))
    assert (recipe.adapter.r, recipe.adapter.target_modules) == (8, ["q_proj"])
    assert (recipe.stage("prefer").template, recipe.stage("prefer").data.window) == ("chatml", [0.0, 9.0])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"data": {"path": "a.json", "merge_turns": 2}}, "prefer trains on pairs; remove it"),
        ({"data": {"path": "a.csv", "columns": {"question": "q", "answer": "a"}}}, "names no rejected answers"),
        ({"packing": "none"}, "packing"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"beta": 0}, "beta"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "it applies to loss sigmoid, not ipo"),
        ({"loss_type": "ipo"}, "Did you mean loss"),
    ],
)
def test_settings_that_it_cannot_have_are_refused(tmp_path: Path, settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        load(tmp_path, {"prefer": {**DATA, **settings}})


@pytest.mark.fault("recipe: preference training of a base that was never taught to answer")
def test_a_base_from_parts_needs_a_stage_that_taught_it_to_answer(tmp_path: Path) -> None:
    def findings(stages: dict[str, Any], **settings: Any) -> list[str]:
        recipe = load(tmp_path, stages, **settings)
        return [str(one) for one in preference_has_a_start(Setup.of(recipe, "new", None))]

    [found] = findings({"align": DATA, "prefer": DATA}, base=PARTS)
    assert "the base is assembled from parts, and no stage before it taught it to answer" in found
    assert findings({"prefer": DATA}) == []
    assert findings({"instruct": DATA, "prefer": DATA}, base=PARTS) == []
    [found] = findings({"prefer": DATA}, base=PARTS, start_from=str(artifact(tmp_path / "projector", "align")))
    assert "of stage align, taught it to answer" in found
    assert findings({"prefer": DATA}, base=PARTS, start_from=str(artifact(tmp_path / "lora", "prefer"))) == []
