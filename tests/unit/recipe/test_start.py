"""`start_from`: what a recipe takes over from an artifact, and what it may not say otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_llava.errors import RecipeError
from lora_llava.recipe.file import dump_resolved, load_recipe
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.start import unlike_the_start

FORM = {
    "r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False,
    "target_modules": r"model\.language_model\..*\.(k_proj|q_proj)",
}  # fmt: skip
MANIFEST = {
    "stage": "instruct", "quantization": {"type": "none", "double_quant": True},
    "template": {"name": "chatml", "system": "Be short."}, "images": {"image_aspect_ratio": "square"},
    "data": {"answer_prompt": None}, "seen": {"steps": 3},
}  # fmt: skip


def write_start(directory: Path, form: dict[str, Any] | None = None, **manifest: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps({**FORM, **(form or {})}), encoding="utf-8")
    (directory / "manifest.json").write_text(json.dumps({**MANIFEST, **manifest}), encoding="utf-8")
    return directory


def load(directory: Path, *overrides: str, stages: tuple[str, ...] = ("instruct",)) -> Recipe:
    path = directory / "more.yaml"
    recipe = {
        "name": "more",
        "output_dir": "run",
        "start_from": "before",
        "base": {"model_name_or_path": "some/llava"},
        "stages": {stage: {"data": {"path": "train.json"}} for stage in stages},
    }
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return load_recipe(path, overrides)


def test_k8_the_form_of_the_lora_is_the_artifacts(tmp_path: Path) -> None:
    write_start(tmp_path / "before", {"use_dora": True, "lora_dropout": 0.1})
    adapter = load(tmp_path).adapter
    assert (adapter.type, adapter.r, adapter.lora_alpha, adapter.lora_dropout) == ("dora", 4, 8.0, 0.1)
    assert adapter.target_modules == ["k_proj", "q_proj"]
    same = ["adapter.r=4", "adapter.lora_alpha=8", "adapter.target_modules=[q_proj, k_proj]", "adapter.type=dora"]
    assert load(tmp_path, *same).adapter == adapter


@pytest.mark.parametrize(
    ("override", "has"),
    [
        ("adapter.r=8", "4"),
        ("adapter.lora_alpha=16", "8.0"),
        ("adapter.lora_dropout=0.5", "0.0"),
        ("adapter.type=rslora", "'lora'"),
        ("adapter.target_modules=[q_proj]", '["k_proj", "q_proj"]'),
        ("adapter.target_modules=all-linear", '["k_proj", "q_proj"]'),
    ],
)
def test_k8_another_form_is_refused_by_name(tmp_path: Path, override: str, has: str) -> None:
    write_start(tmp_path / "before")
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, override)
    key = override.partition("=")[0]
    assert str(caught.value).startswith(f"{key}: ")
    assert f"but the LoRA in start_from ({tmp_path / 'before'}) has {has}, " in str(caught.value)
    assert str(caught.value).endswith(f"which cannot change. Remove {key}")


def test_k8_all_of_another_form_is_refused_at_once(tmp_path: Path) -> None:
    write_start(tmp_path / "before")
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, "adapter.target_modules=[q_proj]", "adapter.lora_dropout=0.5")
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "adapter.lora_dropout",
        "adapter.target_modules",
    ]


def test_k8_every_setting_of_the_adapter_is_compared(tmp_path: Path) -> None:
    other = {"type": "rslora", "r": 9, "lora_alpha": 9, "lora_dropout": 0.9, "target_modules": "[v_proj]"}
    write_start(tmp_path / "before")
    assert set(other) == set(type(load(tmp_path).adapter).model_fields)
    for name, value in other.items():
        with pytest.raises(RecipeError, match=rf"adapter\.{name}: "):
            load(tmp_path, f"adapter.{name}={value}")


def test_k8_a_lora_is_not_dropped_by_a_stage_that_has_none(tmp_path: Path) -> None:
    write_start(tmp_path / "before")
    with pytest.raises(RecipeError, match="has a LoRA, which stage align cannot use"):
        load(tmp_path, stages=("align", "instruct"))


def test_k37_template_system_images_and_precision_are_the_artifacts(tmp_path: Path) -> None:
    write_start(tmp_path / "before")
    recipe = load(tmp_path)
    stage = recipe.stage("instruct")
    assert (stage.template, stage.system, stage.image_aspect_ratio) == ("chatml", "Be short.", "square")
    assert (recipe.quantization.type, recipe.quantization.double_quant) == ("none", True)
    assert not unlike_the_start(recipe)


def test_k37_a_difference_that_is_named_is_used_and_said(tmp_path: Path) -> None:
    write_start(tmp_path / "before")
    named = ["stages.instruct.template=vicuna_v1", "images.image_aspect_ratio=pad", "quantization.type=nf4"]
    recipe = load(tmp_path, *named, "stages.instruct.data.answer_prompt=In a word.")
    stage = recipe.stage("instruct")
    assert (stage.template, stage.system, recipe.quantization.type) == ("vicuna_v1", None, "nf4")
    said = dict(unlike_the_start(recipe))
    assert "'vicuna_v1', but start_from was trained with 'chatml'" in said["stages.instruct.template"]
    assert set(said) == {
        "stages.instruct.template",
        "stages.instruct.system",
        "stages.instruct.image_aspect_ratio",
        "stages.instruct.data.answer_prompt",
        "quantization.type",
    }


def test_k37_the_window_of_grey_images_is_the_artifacts(tmp_path: Path) -> None:
    write_start(tmp_path / "before", images={**MANIFEST["images"], "window": [0.0, 4095.0]})
    evaluated = "evaluation={data: {path: test.json}}"
    recipe = load(tmp_path, evaluated)
    assert recipe.evaluation is not None
    assert recipe.stage("instruct").data.window == recipe.evaluation.data.window == [0.0, 4095.0]
    assert not unlike_the_start(recipe)
    other = load(tmp_path, "stages.instruct.data.window=[0, 255]")
    assert other.stage("instruct").data.window == [0.0, 255.0]
    assert (
        "[0.0, 255.0], but start_from was trained with [0.0, 4095.0]"
        in dict(unlike_the_start(other))["stages.instruct.data.window"]
    )


def test_k37_the_resolved_recipe_states_what_is_used(tmp_path: Path) -> None:
    write_start(tmp_path / "before")
    recipe = load(tmp_path)
    directory = tmp_path / "run"
    directory.mkdir()
    text = dump_resolved(recipe, directory)
    assert yaml.safe_load(text)["adapter"]["r"] == 4
    assert yaml.safe_load(text)["stages"]["instruct"]["template"] == "chatml"
    (directory / "recipe.yaml").write_text(text, encoding="utf-8")
    assert load_recipe(directory / "recipe.yaml") == recipe


def test_k37_the_next_stage_has_a_form_of_its_own(tmp_path: Path) -> None:
    write_start(tmp_path / "before", stage="align", template={"name": "plain", "system": None})
    recipe = load(tmp_path, "adapter.r=16")
    assert (recipe.stage("instruct").template, recipe.adapter.r) == ("vicuna_v1", 16)
    assert not unlike_the_start(recipe)


def test_k37_the_precision_of_a_foreign_adapter_is_not_known(tmp_path: Path) -> None:
    write_start(tmp_path / "before", seen={})
    assert load(tmp_path).quantization.type == "nf4"


def test_an_artifact_that_is_not_there_is_for_the_run_to_refuse(tmp_path: Path) -> None:
    assert load(tmp_path).start_from == tmp_path / "before"
    (tmp_path / "before").mkdir()
    (tmp_path / "before/manifest.json").write_text("[", encoding="utf-8")
    assert load(tmp_path).adapter.r == 128


@pytest.mark.parametrize(
    ("form", "manifest"),
    [
        ({"r": "4"}, {}),
        ({"lora_alpha": "x"}, {}),
        ({"lora_dropout": 2}, {}),
        ({"target_modules": [["q_proj"]]}, {}),
        ({}, {"template": "chatml"}),
        ({}, {"images": [1]}),
        ({}, {"images": {"window": [1]}}),
        ({}, {"data": 3}),
    ],
)
def test_nothing_is_inherited_from_damaged_settings_which_loading_reports(
    tmp_path: Path, form: dict[str, Any], manifest: dict[str, Any]
) -> None:
    write_start(tmp_path / "before", form, **manifest)
    recipe = load(tmp_path)
    assert (recipe.adapter.r, recipe.stage("instruct").template) == (128, "vicuna_v1")
    assert unlike_the_start(recipe) == []
