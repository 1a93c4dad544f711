"""Settings that a recipe changes and that nothing in this run reads: refused, or said, by name.

Refused is what could mislead about the result. What decides speed, or how often something is shown, and what a common
override leaves without effect (`stages.instruct=null`, `data.validation=null`, `max_steps`), is a notice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_llava.recipe.errors import shown
from lora_llava.recipe.fields import Settings, is_local
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.stages import DataSettings, StageSettings

_ONE_FILE = (".json", ".jsonl", ".csv", ".tsv")
_OF_THE_MODEL = {
    "vision_feature_layer": ("vision_feature_layer", -2),
    "vision_feature_select_strategy": ("vision_feature_select_strategy", "default"),
    "mm_projector_type": ("projector_hidden_act", "gelu"),
}
"""Settings of a fresh model: where the config.json of a whole one has them, and what is meant where it is silent."""
FRESH = ("projector_init", *_OF_THE_MODEL)
"""Settings of `base` by which a model is made of parts."""
_PROJECTOR_TYPES = {"gelu": "mlp2x_gelu", "linear": "linear"}


@dataclass(frozen=True, slots=True)
class Unused:
    """A setting that was changed and has no effect."""

    key: str
    value: Any
    because: str
    fix: str = "Leave it out"
    refused: bool = True

    def __str__(self) -> str:
        """Write it as one line."""
        return f"{self.key}: {self.what}. {self.fix}."

    @property
    def what(self) -> str:
        """Say what is wrong, without the key."""
        return f"{shown(self.value)} has no effect, because {self.because}"


def unused_settings(recipe: Recipe) -> Iterator[Unused]:
    """Yield the settings of a recipe that differ from their defaults and have no effect, in the order of the recipe."""
    yield from _unused_in_base(recipe)
    if recipe.quantization.type == "none":
        yield from _changed(recipe.quantization, "quantization", ["double_quant"], "quantization.type is none")
        names = ["keep_dequantized"]
        yield from _changed(recipe.quantization, "quantization", names, "quantization.type is none", refused=False)
    if recipe.stages.instruct is None:
        names = list(type(recipe.adapter).model_fields)
        because = "LoRA belongs to stage instruct, which the recipe does not have"
        yield from _changed(recipe.adapter, "adapter", names, because, refused=False)
    stages = {f"stages.{name}": recipe.stage(name) for name in recipe.stage_names}
    if all(stage.image_aspect_ratio is not None for stage in stages.values()):
        yield from _changed(recipe.images, "images", ["image_aspect_ratio"], "every stage sets its own")
    for place, stage in stages.items():
        yield from _unused_in_stage(place, stage)
        yield from _unused_in_data(f"{place}.data", stage.data)
    if recipe.evaluation is not None:
        yield from _unused_in_data("evaluation.data", recipe.evaluation.data)


def unlike_the_model(recipe: Recipe, config: Mapping[str, Any]) -> Iterator[Unused]:
    """Yield the settings of a fresh model that are given and are not those of the base, whose config.json this is."""
    base = recipe.base
    if base.model_name_or_path is None:
        return
    for name, (key, default) in _OF_THE_MODEL.items():
        has = config.get(key, default)
        has = _PROJECTOR_TYPES.get(str(has), has) if name == "mm_projector_type" else has
        if name in base.model_fields_set and getattr(base, name) != has:
            because = f"base.model_name_or_path names a whole model, which has {shown(has)}"
            yield Unused(f"base.{name}", getattr(base, name), because, "Leave it out, or make a model of parts")


def _unused_in_base(recipe: Recipe) -> Iterator[Unused]:
    base = recipe.base
    if base.model_name_or_path is None:
        return
    because = "base.model_name_or_path names a whole model, whose projector is trained already"
    yield from _changed(base, "base", ["projector_init"], because)
    if is_local(base.model_name_or_path):
        yield from _changed(base, "base", ["revision"], "base.model_name_or_path is a directory, not a Hub id")


def _unused_in_stage(place: str, stage: StageSettings) -> Iterator[Unused]:
    if stage.template == "plain":
        yield from _changed(stage, place, ["system"], "template plain has no system text")
        because = "template plain trains on the answer alone, without a question"
        yield from _changed(stage.data, f"{place}.data", ["answer_prompt"], because)
    if stage.lr_scheduler_type == "constant":
        fix = "Set lr_scheduler_type: constant_with_warmup, or leave it out"
        yield from _changed(stage, place, ["warmup_ratio"], "lr_scheduler_type constant has no warm-up", fix)
    if stage.on_non_finite != "skip":
        fix = "Set on_non_finite: skip, or leave it out"
        yield from _changed(stage, place, ["max_non_finite_steps"], "on_non_finite stops at the first such step", fix)
    if stage.max_steps > 0:
        names, because = ["num_train_epochs"], f"max_steps sets the number of steps, {stage.max_steps:,}"
        yield from _changed(stage, place, names, because, refused=False)
    if stage.packing == "none":
        yield from _changed(stage, place, ["branches_per_tree"], "packing is none", refused=False)
    if stage.gradient_checkpointing != "selective":
        names, because = ["gradient_checkpointing_layers"], "gradient_checkpointing is not selective"
        yield from _changed(stage, place, names, because, refused=False)
    if stage.data.validation is None:
        names = ["eval_steps", "num_sample_answers", "keep"]
        yield from _changed(stage, place, names, "the stage has no data.validation", refused=False)


def _unused_in_data(place: str, data: DataSettings) -> Iterator[Unused]:
    if data.on_bad_record != "skip":
        fix = "Set on_bad_record: skip, or leave it out"
        yield from _changed(data, place, ["max_bad_records"], "on_bad_record stops at the first such record", fix)
    if data.path.endswith(_ONE_FILE):
        yield from _changed(
            data, place, ["split"], f"a {Path(data.path).suffix} file has no splits", "Name another file in path"
        )
    elif is_local(data.path):
        yield from _changed(data, place, ["revision"], "path is on this disk, and only Hub data sets have revisions")
        if data.path.endswith(".parquet"):
            yield from _changed(data, place, ["name"], "path is a file, and only data sets have configurations")


def _changed(
    section: Settings, place: str, names: list[str], because: str, fix: str = "Leave it out", *, refused: bool = True
) -> Iterator[Unused]:
    """Yield those of the settings that are not at their default: defaults are written out in a run's own recipe."""
    for name in names:
        value = getattr(section, name)
        if name in section.model_fields_set and value != type(section).model_fields[name].default:
            yield Unused(f"{place}.{name}", value, because, fix, refused)
