"""Find settings that a recipe changes but that have no effect in this run; they are errors or notices.

An error if the setting could mislead about the result. A notice if it affects only speed or logging, or lost its effect
through a common override (`stages.instruct=null`, `data.validation=null`, `max_steps`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_llava.recipe.errors import shown
from lora_llava.recipe.fields import RECORD_FILES, Settings, is_local
from lora_llava.recipe.settings import PROJECTOR_ACTIVATIONS, Recipe
from lora_llava.recipe.stages import DataSettings, PreferSettings, StageSettings, trains_lora

_PROJECTOR_TYPES = {activation: name for name, activation in PROJECTOR_ACTIVATIONS.items()}


@dataclass(frozen=True, slots=True)
class Unused:
    """A changed setting that has no effect."""

    key: str
    value: Any
    because: str
    fix: str = "Remove it"
    refused: bool = True

    def __str__(self) -> str:
        """Return a one-line message."""
        return f"{self.key}: {self.what}. {self.fix}."

    @property
    def what(self) -> str:
        """The message without the key."""
        return f"{shown(self.value)} has no effect, because {self.because}"


def unused_settings(recipe: Recipe) -> Iterator[Unused]:
    """Yield the settings that differ from their defaults but have no effect, in the order of the recipe."""
    yield from _unused_in_base(recipe)
    if recipe.quantization.type == "none":
        yield from _changed(recipe.quantization, "quantization", ["double_quant"], "quantization.type is none")
        names = ["keep_dequantized"]
        yield from _changed(recipe.quantization, "quantization", names, "quantization.type is none", refused=False)
    if not any(trains_lora(stage) for stage in recipe.stage_names):
        names = list(type(recipe.adapter).model_fields)
        because = "no stage of the recipe trains a LoRA"
        yield from _changed(recipe.adapter, "adapter", names, because, refused=False)
    stages = {f"stages.{name}": recipe.stage(name) for name in recipe.stage_names}
    if all(stage.image_aspect_ratio is not None for stage in stages.values()):
        yield from _changed(recipe.images, "images", ["image_aspect_ratio"], "every stage sets its own")
    if all(stage.data.window not in (None, recipe.images.window) for stage in stages.values()):
        yield from _changed(recipe.images, "images", ["window"], "the data of every stage set their own")
    for key, stage in stages.items():
        yield from _unused_in_stage(key, stage)
        yield from _unused_in_sources(f"{key}.data", stage.data)
    if recipe.evaluation is not None:
        yield from _unused_in_sources("evaluation.data", recipe.evaluation.data)


def unlike_the_model(recipe: Recipe, config: Mapping[str, Any]) -> Iterator[Unused]:
    """Yield the settings for a new model that differ from `config`, the config.json of the existing base."""
    base = recipe.base
    if base.model_name_or_path is None:
        return
    for name, note in base.of_new_model().items():
        if note.config_key is None:
            continue
        value = config.get(note.config_key, note.default)
        value = _PROJECTOR_TYPES.get(str(value), value) if name == "mm_projector_type" else value
        if name in base.model_fields_set and getattr(base, name) != value:
            because = f"base.model_name_or_path is a complete model, which has {shown(value)}"
            yield Unused(f"base.{name}", getattr(base, name), because, "Remove it, or assemble a model from parts")


def _unused_in_base(recipe: Recipe) -> Iterator[Unused]:
    base = recipe.base
    if base.model_name_or_path is None:
        return
    because = "base.model_name_or_path is a complete model, whose projector is already trained"
    yield from _changed(base, "base", ["projector_init"], because)
    if is_local(base.model_name_or_path):
        yield from _changed(base, "base", ["revision"], "base.model_name_or_path is a directory, not a Hub id")


def _unused_in_stage(key: str, stage: StageSettings) -> Iterator[Unused]:
    if stage.template == "plain":
        yield from _changed(stage, key, ["system"], "template plain has no system prompt")
        because = "template plain has no question"
        for number, source in enumerate(stage.data.sources):
            yield from _changed(source, f"{key}.data.{number}" if number else f"{key}.data", ["answer_prompt"], because)
    if stage.lr_scheduler_type == "constant":
        fix = "Set lr_scheduler_type: constant_with_warmup, or remove it"
        yield from _changed(stage, key, ["warmup_ratio"], "lr_scheduler_type constant has no warmup", fix)
    if stage.on_non_finite != "skip":
        fix = "Set on_non_finite: skip, or remove it"
        yield from _changed(
            stage, key, ["max_non_finite_steps"], "on_non_finite is error: the first such step stops the run", fix
        )
    if stage.max_steps > 0:
        names, because = ["num_train_epochs"], f"max_steps sets the number of steps, {stage.max_steps:,}"
        yield from _changed(stage, key, names, because, refused=False)
    if isinstance(stage, PreferSettings):
        yield from _unused_with_pairs(key, stage)
    if stage.packing == "none":
        yield from _changed(stage, key, ["branches_per_tree"], "packing is none", refused=False)
    if stage.gradient_checkpointing != "selective":
        names, because = ["gradient_checkpointing_layers"], "gradient_checkpointing is not selective"
        yield from _changed(stage, key, names, because, refused=False)
    if not stage.data.holds_out:
        names = ["eval_steps", "num_sample_answers", "keep"]
        yield from _changed(stage, key, names, "the stage has no data.validation", refused=False)


def _unused_with_pairs(key: str, stage: PreferSettings) -> Iterator[Unused]:
    if stage.loss != "sigmoid":
        fix = "Set loss: sigmoid, or remove it"
        yield from _changed(stage, key, ["label_smoothing"], f"it applies to loss sigmoid, not {stage.loss}", fix)
    because = "a tree holds one pair, so that its answers share as much as they can"
    yield from _changed(stage, key, ["branches_per_tree"], because, refused=False)


def _unused_in_sources(key: str, data: DataSettings) -> Iterator[Unused]:
    for number, source in enumerate(data.sources):
        yield from _unused_in_data(f"{key}.{number}" if number else key, source)


def _unused_in_data(key: str, data: DataSettings) -> Iterator[Unused]:
    if data.on_bad_record != "skip":
        fix = "Set on_bad_record: skip, or remove it"
        yield from _changed(
            data, key, ["max_bad_records"], "on_bad_record is error: the first such record stops the run", fix
        )
    if data.path.endswith(RECORD_FILES):
        yield from _changed(
            data, key, ["split"], f"a {Path(data.path).suffix} file has no splits", "Name another file in path"
        )
    elif is_local(data.path):
        yield from _changed(data, key, ["revision"], "path is local, and only Hub datasets have revisions")
        if data.path.endswith(".parquet") and not Path(data.path).is_dir():
            if "[" not in data.split:
                because = "a parquet file has no splits, only slices such as train[:9]"
                yield from _changed(data, key, ["split"], because, refused=False)
            yield from _changed(data, key, ["name"], "path is a file, and only datasets have configurations")


def _changed(
    section: Settings, key: str, names: list[str], because: str, fix: str = "Remove it", *, refused: bool = True
) -> Iterator[Unused]:
    """Yield the settings that differ from their defaults; the recipe that a run writes includes defaults."""
    for name in names:
        value = getattr(section, name)
        if name in section.model_fields_set and value != type(section).model_fields[name].default:
            yield Unused(f"{key}.{name}", value, because, fix, refused)
