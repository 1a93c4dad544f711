"""The recipes of the repository: all ship, load, say what they need, and hold what their headers claim."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

import lora_llava
from lora_llava.cli import cli
from lora_llava.recipe.file import bundled_recipes, load_recipe

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "recipes").glob("*.yaml"))
NAMES = {
    "quickstart",
    "easy_vqa",
    "llava_v15_7b",
    "llava_v15_13b",
    "medical_vqa",
    "continue",
    "hallucination",
    "quickstart_prefer",
}


def header_of(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))])


def test_every_recipe_of_the_repository_ships() -> None:
    assert {path.stem for path in FILES} == NAMES
    assert set(bundled_recipes()) == NAMES
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert "assets/*/*" in setup["options.package_data"]["lora_llava"]
    assert (Path(lora_llava.__file__).parent / "assets/recipes").samefile(ROOT / "recipes")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_its_header_says_what_it_needs(path: Path) -> None:
    assert load_recipe(path).name == path.stem
    header = header_of(path)
    assert len(header.splitlines()[0].removeprefix("# ")) > 20
    for word in ("Card:", "Data:", "License:"):
        assert re.search(rf"^# {word} +\S", header, re.MULTILINE), word
    commands = re.findall(r"^# +lora-llava (\w+)(?: (\S+))?", header, re.MULTILINE)
    assert commands
    assert {command for command, _ in commands} <= set(cli.commands)
    assert {Path(file).name for _, file in commands if file.endswith(".yaml")} <= {path.name}


def test_the_medical_recipe_is_not_for_the_clinic() -> None:
    assert re.search("not for clinical use", header_of(ROOT / "recipes/medical_vqa.yaml"), re.IGNORECASE)


def test_llava_is_trained_as_the_original_is() -> None:
    recipe = load_recipe(ROOT / "recipes/llava_v15_7b.yaml")
    align, instruct, adapter = recipe.stages.align, recipe.stages.instruct, recipe.adapter
    assert align is not None
    assert instruct is not None
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (128, 256, 0.05)
    assert (align.learning_rate, align.batch_size, align.template, align.image_aspect_ratio) == (
        1e-3,
        256,
        "plain",
        "square",
    )
    assert (instruct.learning_rate, instruct.mm_projector_lr, instruct.batch_size) == (2e-4, 2e-5, 128)
    assert (instruct.template, instruct.image_aspect_ratio) == ("vicuna_v1", "pad")
    for stage in (align, instruct):
        assert (stage.max_length, stage.num_train_epochs, stage.warmup_ratio) == (2048, 1.0, 0.03)
        assert (stage.weight_decay, stage.lr_scheduler_type) == (0.0, "cosine")


def test_the_two_sizes_of_llava_differ_in_the_language_model_only() -> None:
    small, large = (load_recipe(ROOT / f"recipes/llava_v15_{size}.yaml").plain() for size in ("7b", "13b"))
    assert small.pop("name") != large.pop("name")
    assert small["base"].pop("language_model") != large["base"].pop("language_model")
    assert small == large


def test_k37_the_recipe_for_going_on_takes_the_adapter_as_it_is() -> None:
    recipe = load_recipe(ROOT / "recipes/continue.yaml")
    assert recipe.start_from is not None
    assert recipe.stage_names == ["instruct"]
    assert recipe.evaluation is not None
    given = recipe.model_fields_set, recipe.stage("instruct").model_fields_set
    assert not {"adapter", "quantization", "images"} & given[0]
    assert not {"template", "system", "image_aspect_ratio"} & given[1]
    page = (ROOT / "docs/continue.md").read_text(encoding="utf-8")
    assert "start_from" in page
    assert "recipes copy continue" in page
