"""Settings without effect are refused by name; what only an override leaves idle is a notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_llava.errors import RecipeError
from lora_llava.recipe.file import bundled_recipes, dump_resolved, load_recipe, read_recipe
from lora_llava.recipe.unused import unlike_the_model, unused_settings

WHOLE = {"model_name_or_path": "some/llava"}
PARTS = {"language_model": "some/lm", "vision_tower": "some/tower"}

ASPECTS = {"images": "square", "stages.align": "pad", "stages.instruct": "pad"}


def write(directory: Path, base: dict[str, Any] | None = None, stages: tuple[str, ...] = ("align", "instruct")) -> Path:
    data = {"path": "data/train.json", "validation": {"share": 0.1}}
    recipe = {"name": "small", "base": base or WHOLE, "stages": {stage: {"data": data} for stage in stages}}
    path = directory / "small.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


REFUSED = [
    (["base.projector_init=embeddings"], "base.projector_init"),
    (["base.model_name_or_path=/some/llava", "base.revision=main"], "base.revision"),
    (["quantization.type=none", "quantization.double_quant=false"], "quantization.double_quant"),
    (["stages.align.system=Hello"], "stages.align.system"),
    (["stages.align.data.answer_prompt=Be short"], "stages.align.data.answer_prompt"),
    (
        ["stages.instruct.lr_scheduler_type=constant", "stages.instruct.warmup_ratio=0.1"],
        "stages.instruct.warmup_ratio",
    ),
    (["stages.instruct.max_non_finite_steps=5"], "stages.instruct.max_non_finite_steps"),
    (["stages.instruct.data.max_bad_records=5"], "stages.instruct.data.max_bad_records"),
    (["stages.instruct.data.split=test"], "stages.instruct.data.split"),
    (["evaluation={data: {path: a.json, split: test}}"], "evaluation.data.split"),
    (["evaluation={data: {path: a.json, max_bad_records: 3}}"], "evaluation.data.max_bad_records"),
    (
        [f"{place}.image_aspect_ratio={pad}" for place, pad in ASPECTS.items()],
        "images.image_aspect_ratio",
    ),
    (
        ["stages.instruct.data={path: ./a.parquet, name: x, columns: {question: q, answer: a}}"],
        "stages.instruct.data.name",
    ),
    (
        ["stages.instruct.data={path: ./dir, revision: x, columns: {question: q, answer: a}}"],
        "stages.instruct.data.revision",
    ),
]  # fmt: skip
NOTICED = [
    (["quantization.type=none", "quantization.keep_dequantized=false"], "quantization.keep_dequantized"),
    (["stages.instruct=null", "adapter.r=8"], "adapter.r"),
    (["stages.instruct.max_steps=5", "stages.instruct.num_train_epochs=2"], "stages.instruct.num_train_epochs"),
    (["stages.instruct.packing=none", "stages.instruct.branches_per_tree=4"], "stages.instruct.branches_per_tree"),
    (["stages.instruct.gradient_checkpointing_layers=2"], "stages.instruct.gradient_checkpointing_layers"),
    (["stages.instruct.data.validation=null", "stages.instruct.eval_steps=4"], "stages.instruct.eval_steps"),
    (
        ["stages.instruct.data.validation=null", "stages.instruct.num_sample_answers=1"],
        "stages.instruct.num_sample_answers",
    ),
    (
        ["stages.instruct.data={path: ./a.parquet, split: test, columns: {question: q, answer: a}}"],
        "stages.instruct.data.split",
    ),
]  # fmt: skip


def test_a_slice_of_a_parquet_file_has_an_effect(tmp_path: Path) -> None:
    data = "stages.instruct.data={path: ./a.parquet, split: 'train[:9]', columns: {question: q, answer: a}}"
    assert not list(unused_settings(load_recipe(write(tmp_path), [data])))


@pytest.mark.parametrize(("overrides", "key"), REFUSED, ids=[key for _, key in REFUSED])
def test_k36_a_setting_that_could_mislead_is_refused_by_name(tmp_path: Path, overrides: list[str], key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path), overrides)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{tmp_path / 'small.yaml'}: {key}: ")
    assert " has no effect, because " in line
    assert line.endswith(".")


@pytest.mark.parametrize(("overrides", "key"), NOTICED, ids=[key for _, key in NOTICED])
def test_k36_a_setting_that_an_override_leaves_idle_is_said(tmp_path: Path, overrides: list[str], key: str) -> None:
    recipe = load_recipe(write(tmp_path), overrides)
    assert [one.key for one in unused_settings(recipe) if not one.refused] == [key]


@pytest.mark.parametrize("overrides", [overrides for overrides, _ in REFUSED])
def test_k36_the_recipe_of_an_older_run_is_read_all_the_same(tmp_path: Path, overrides: list[str]) -> None:
    assert read_recipe(write(tmp_path), overrides).name == "small"


@pytest.mark.parametrize("name", bundled_recipes())
def test_k36_a_resolved_recipe_is_not_refused_for_the_defaults_it_states(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(bundled_recipes()[name])
    assert not list(unused_settings(recipe))
    (tmp_path / "recipe.yaml").write_text(dump_resolved(recipe, tmp_path), encoding="utf-8")
    assert not list(unused_settings(load_recipe(tmp_path / "recipe.yaml")))


def test_k36_what_the_model_has_is_not_said_otherwise(tmp_path: Path) -> None:
    config = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu"}
    same = ["base.vision_feature_layer=-2", "base.mm_projector_type=mlp2x_gelu"]
    assert not list(unlike_the_model(read_recipe(write(tmp_path), same), config))
    other = [
        "base.vision_feature_layer=-1",
        "base.mm_projector_type=linear",
        "base.vision_feature_select_strategy=full",
    ]
    found = list(unlike_the_model(read_recipe(write(tmp_path), other), config))
    assert sorted(one.key.removeprefix("base.") for one in found) == [
        "mm_projector_type",
        "vision_feature_layer",
        "vision_feature_select_strategy",
    ]
    [layer] = [str(one) for one in found if one.key == "base.vision_feature_layer"]
    assert "which has -2. Remove it, or assemble a model from parts." in layer
    # The default differs from this model, and nobody said it.
    assert not list(unlike_the_model(read_recipe(write(tmp_path)), {**config, "vision_feature_layer": -1}))
    assert not list(unlike_the_model(read_recipe(write(tmp_path, PARTS), other), config))
