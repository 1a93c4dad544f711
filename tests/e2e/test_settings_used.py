"""Every setting of a first run is read by it, or refused by its name; and a run that starts from an artifact."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from rich.console import Console

from lora_llava.artifact import read_manifest
from lora_llava.cli import cli
from lora_llava.errors import RecipeError
from lora_llava.recipe.fields import Settings, section_in, settings_of
from lora_llava.recipe.file import load_recipe
from lora_llava.recipe.settings import Recipe
from lora_llava.training.run import run_recipe
from tests.helpers.pairs import write_pairs
from tests.helpers.resuming import train
from tests.helpers.settings import other_values

WALKERS = ("recipe_base", "recipe_unused", "recipe_start", "recipe_errors", "recipe_file", "preflight.settings")
"""Modules that look at settings without doing what they say."""
EVERYTHING = (
    "evaluation={data: {path: train.json, image_root: images, max_records: 4}, max_new_tokens: 2}",
    "stages.align.max_steps=1", "stages.instruct.max_steps=1", "stages.align.template=chatml",
    "stages.align.data.validation={share: 0.2}", "stages.instruct.on_non_finite=skip",
    "stages.instruct.data.on_bad_record=skip", "stages.instruct.data.answer_prompt=In a word.",
    "stages.instruct.data.merge_turns=2", "stages.instruct.gradient_checkpointing=selective",
    "stages.align.gradient_checkpointing=selective", "stages.align.on_non_finite=skip",
    "stages.instruct.data.validation={path: captions.json}",
    "stages.prefer={data: {path: pairs.json, image_root: images, validation: {share: 0.2}}, max_steps: 1, "
    "gradient_checkpointing: selective, on_non_finite: skip}",
)  # fmt: skip
ELSEWHERE = {
    "version": "has one value",
    "base.language_model": "parts", "base.gguf_file": "parts", "base.vision_tower": "parts",
    "base.mm_projector_type": "parts", "base.projector_init": "parts", "base.vision_feature_layer": "parts",
    "base.vision_feature_select_strategy": "parts",
    "images.window": "is the default of data.window",
    "distributed.engine": "of several processes",
    **{f"stages.{stage}.cuda_graphs": "CUDA alone" for stage in ("align", "instruct", "prefer")},
}  # fmt: skip
"""Settings that this run cannot read: those of a base made of parts are refused next to a whole one."""
TABLES = ("columns.", ".name", ".revision", ".split", "card.")
"""Settings of tables and of the Hub, and of the model card, which `push` reads."""


class Reads:
    """Notes the settings that code reads, by their keys."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.places: dict[type[Settings], set[str]] = {}
        self._note(Recipe, "")

    def _note(self, section: type[Settings], place: str) -> None:
        self.places.setdefault(section, set()).add(place)
        for name, field in section.model_fields.items():
            if (below := section_in(field.annotation)) is not None:
                self._note(below, f"{place}{name}.")

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        original = Settings.__getattribute__

        def read(section: Settings, name: str) -> Any:
            kind = object.__getattribute__(section, "__class__")
            if name in kind.model_fields:
                module = str(sys._getframe(1).f_globals.get("__name__"))
                if module.startswith("lora_llava.") and not module.endswith(WALKERS):
                    self.keys |= {f"{place}{name}" for place in self.places.get(kind, set())}
            return original(section, name)

        patch.setattr(Settings, "__getattribute__", read)


@pytest.fixture(scope="module")
def reads(project: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What a run with all of it reads."""
    found = Reads()
    write_pairs(project.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.parent)
        overrides = (*EVERYTHING, f"output_dir={tmp_path_factory.mktemp('reads') / 'run'}")
        recipe = load_recipe(project, overrides)
        found.watch(patch)
        run_recipe(recipe, Console(quiet=True))
    return found.keys


def test_k36_every_setting_is_read_by_a_run(reads: set[str]) -> None:
    keys = {one.key for one in settings_of(Recipe)} - set(ELSEWHERE)
    unread = {key for key in keys - reads if not any(part in key for part in TABLES)}
    assert not unread


def test_k36_every_setting_changed_alone_in_a_first_run_loads_or_is_refused_by_name(project: Path) -> None:
    refused = {}
    for key, override in other_values(project).items():
        try:
            load_recipe(project, [override])
        except RecipeError as error:
            refused[key] = str(error)
    assert {"base.projector_init", "base.revision", "quantization.double_quant"} <= set(refused)
    assert [key for key, error in refused.items() if f"{key}: " not in error] == []


def test_k8_the_dry_run_shows_the_adapter_that_is_trained(project: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    train(project, first, "stages.align=null", "adapter.target_modules=[q_proj]", "stages.instruct.max_steps=1")
    start = f"start_from={first / 'instruct'}"
    base = [str(project), "stages.align=null", "stages.instruct.max_steps=1", f"output_dir={tmp_path / 'more'}"]
    shown = CliRunner().invoke(cli, ["finetune", *base, start, "--dry-run"])
    assert shown.exit_code == 0, shown.output
    made = CliRunner().invoke(cli, ["finetune", *base, start])
    assert made.exit_code == 0, made.output
    rows = [next(line for line in one.output.splitlines() if "language_model" in line) for one in (shown, made)]
    # Rank 4 on q_proj, 48 to 48, of two layers.
    assert all(" 768 " in row for row in rows), rows
    adapter = yaml.safe_load((tmp_path / "more/recipe.yaml").read_text(encoding="utf-8"))["adapter"]
    assert adapter["target_modules"] == ["q_proj"]
    for override in ("adapter.target_modules=[k_proj]", "adapter.lora_dropout=0.5", "adapter.r=8"):
        for command in (["finetune"], ["finetune", "--dry-run"], ["check"]):
            refused = CliRunner().invoke(cli, [*command, *base, start, override])
            assert refused.exit_code == 2
            assert f"{override.partition('=')[0]}: is " in refused.stderr


def test_k37_an_adapter_goes_on_in_the_form_it_was_taught(project: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    taught = ["stages.instruct.template=chatml", "stages.instruct.system=Be short.", "images.image_aspect_ratio=square"]
    train(project, first, "stages.align=null", *taught, "stages.instruct.max_steps=1")
    base = [str(project), "stages.align=null", "stages.instruct.max_steps=1", f"start_from={first / 'instruct'}"]
    made = CliRunner().invoke(cli, ["finetune", *base, f"output_dir={tmp_path / 'more'}"])
    assert made.exit_code == 0, made.output
    manifest = read_manifest(tmp_path / "more/instruct")
    assert manifest.template == {"name": "chatml", "system": "Be short."}
    assert manifest.images["image_aspect_ratio"] == "square"
    stated = yaml.safe_load((tmp_path / "more/recipe.yaml").read_text(encoding="utf-8"))["stages"]["instruct"]
    assert (stated["template"], stated["system"], stated["image_aspect_ratio"]) == ("chatml", "Be short.", "square")
    other = [*base, "stages.instruct.template=vicuna_v1", f"output_dir={tmp_path / 'other'}"]
    for command in (["finetune", "--dry-run"], ["check"], ["finetune"]):
        done = CliRunner().invoke(cli, [*command, *other])
        assert "but start_from was trained with 'chatml'" in " ".join(done.output.split()), done.output


def test_k36_a_whole_model_is_not_what_a_recipe_says_of_a_fresh_one(project: Path, tmp_path: Path) -> None:
    base = Path(str(load_recipe(project).base.model_name_or_path))
    has = json.loads((base / "config.json").read_text(encoding="utf-8"))["vision_feature_layer"]
    for override in ("base.vision_feature_layer=-1", "base.mm_projector_type=linear", "base.projector_init=embeddings"):
        for command in (["finetune"], ["finetune", "--dry-run"], ["check"]):
            done = CliRunner().invoke(cli, [*command, str(project), override, f"output_dir={tmp_path / 'run'}"])
            assert done.exit_code == 2
            assert f"{override.partition('=')[0]}: " in done.stderr
            assert "has no effect, because base.model_name_or_path is a complete model" in done.stderr
    same = ["finetune", str(project), f"base.vision_feature_layer={has}", "--dry-run", f"output_dir={tmp_path / 'run'}"]
    assert CliRunner().invoke(cli, same).exit_code == 0
