"""What a stage depends on, and what of it differs between a run and what it left: named, and refused by default."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from lora_llava.artifact import file_sha256, library_versions
from lora_llava.data.images.fingerprint import picture_facts, same_pictures
from lora_llava.data.load import fingerprint
from lora_llava.data.stage import StageData
from lora_llava.errors import TrainingError
from lora_llava.formats.peft_adapter import WEIGHTS
from lora_llava.planning.memory_plan import MemoryPlan, StageShapes
from lora_llava.planning.speed import Machine
from lora_llava.recipe.fields import OnResume, settings_of, value_at
from lora_llava.recipe.file import read_recipe
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.stages import StageName
from lora_llava.run_directory import output
from lora_llava.system.device import world_size
from lora_llava.system.files import shown_path
from lora_llava.system.text import counted
from lora_llava.training.stage import Stage

Resume = Literal["no", "exact", "anyway"]
"""Start a run; resume one that is still the same; resume one that is not."""

Difference = tuple[str, Any, Any]
"""Key, what it was, what it is."""

_LOST = {
    OnResume.FORM: "one model, asked in one form, for the whole stage: {name} holds from here on",
    OnResume.LATER: "one {name} for the whole stage: it holds from here on",
    OnResume.ROUNDING: "figures that are those of an uninterrupted run bit by bit",
    OnResume.VALIDATION: "validation losses that can be compared with the earlier ones",
    OnResume.ORDER: "each record once an epoch: the plan is another one, and is entered at the same step",
}
"""What a run that is resumed with another value no longer is."""
SHARED = {
    "align": ("name", "seed", "precision", "attn_implementation", "base", "quantization", "images"),
    "instruct": ("name", "seed", "precision", "attn_implementation", "base", "quantization", "images", "adapter"),
}
"""Settings and sections of a recipe that a stage depends on besides its own."""
_COMPARED = {*_LOST, OnResume.FIXED}
"""What of a stage that is not finished is compared by value; the rest may change, or what it comes to is compared."""
_COMPARED_IF_FINISHED = {*_COMPARED, OnResume.RESOLVED, OnResume.FREE}
BASE, START = "base (its weights)", "start_from (its weights)"
IMAGES = "data (images)"


def run_facts(stage: Stage, shapes: StageShapes, data: StageData, plan: MemoryPlan, machine: Machine) -> dict[str, Any]:
    """Collect what a stage depends on besides the settings of its recipe, by recipe key where there is one."""
    key = stage.key
    return {
        BASE: stage.base.weights_sha256,
        "base.vision_feature_layer": shapes.config.vision_feature_layer,
        "base.vision_feature_select_strategy": shapes.config.vision_feature_select_strategy,
        START: file_sha256(stage.parent / WEIGHTS) if stage.parent else None,
        f"{key}.data (number of records)": len(data.encoded),
        f"{key}.data (sha256 of the records)": fingerprint(data.encoded.records),
        f"{key}.data.validation (sha256 of the records)": fingerprint(data.validation.records),
        f"{key}.batch_size": data.length.batch_size,
        f"{key}.{IMAGES}": picture_facts([*data.encoded.records, *data.validation.records]),
        f"{key}.tokens_per_micro_batch": plan.tokens_per_micro_batch,
        f"{key}.gradient_checkpointing": str(plan.recompute),
        f"{key}.optim": plan.optim,
        "quantization.keep_dequantized": plan.keep_dequantized,
        "attn_implementation": machine.attention,
        "precision": str(shapes.dtype).removeprefix("torch."),
        "device": machine.device,
        "processes": world_size(),
        **{f"version of {name}": found for name, found in library_versions().items()},
    }


def changed_facts(before: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Difference]:
    """List the facts that are not what they were; image files that an older version did not note are not compared."""
    changed: list[Difference] = []
    for key, now in facts.items():
        then = before.get(key)
        if key.endswith(IMAGES):
            if then is not None and not same_pictures(then, now):
                changed.append((key, _files(then), _files(now)))
        elif then != now:
            changed.append((key, then, now))
    return changed


def _files(facts: dict[str, Any]) -> str:
    """Describe image files in a few words that differ where they do."""
    return f"{counted(facts['files'], 'file')}, {facts['bytes']:,} bytes, sha256 {facts['content'] or facts['times']}"


def changed_settings(directory: Path, stage: Stage, *, finished: bool = False) -> list[Difference]:
    """List the settings of `stage` that differ from those of the artifact or checkpoint in `directory`.

    Of a stage that is `finished`, also those that affect only logging or speed.
    """
    compared = _COMPARED_IF_FINISHED if finished else _COMPARED
    keys = [one.key for one in settings_of(Recipe) if one.on_resume in compared and _concerns(one.key, stage.name)]
    if finished and stage.is_last:
        keys.append("report_to")
    return differing_values(keys, stored_recipe(directory), stage.recipe)


def differing_values(keys: Iterable[str], before: Recipe, now: Recipe) -> list[Difference]:
    """List those of the settings that differ between two recipes, with both values."""
    pairs = [(key, value_at(before, key), value_at(now, key)) for key in keys]
    return [(key, then, later) for key, then, later in pairs if then != later]


def refuse_or_warn(
    differences: list[Difference],
    stage: Stage,
    directory: Path,
    resume: Resume,
    console: Console,
    *,
    finished: bool = False,
) -> None:
    """Raise TrainingError if there are differences; with `anyway`, list the guarantees that are lost.

    `directory`: the artifact or checkpoint that differs from the run.
    """
    if not differences:
        return
    lines = [f"  {key}: {_shown(before)} then, {_shown(now)} now" for key, before, now in differences]
    without_effect = ". It is finished, so these have no effect" if finished else ""
    head = f"stage {stage.name} is not what it was when {shown_path(directory)} was written{without_effect}:"
    listed = "\n".join([head, *lines])
    fixed = [key for key, _, _ in differences if key == BASE or note_of(key) is OnResume.FIXED]
    if fixed:
        raise TrainingError(
            f"{listed}\nWeights trained so far fit nothing else ({', '.join(fixed)}). Set these back, or start a new "
            "run with another output_dir."
        )
    lost = [f"these settings: {shown_path(directory)} stays as it is"] if finished else lost_guarantees(differences)
    if resume != "anyway":
        further = f" To train further, or on other data, start a new run with start_from={shown_path(directory)}."
        raise TrainingError(
            f"{listed}\nSet these back to resume as if nothing had happened: {shown_path(stage.run_directory)}/"
            f"{output.RECIPE} is the recipe of the run. Or resume with --resume-anyway, which gives up: "
            f"{'; '.join(lost)}.{further if finished else ''}"
        )
    text = f"{listed}\nresumed anyway, which gives up: {'; '.join(lost)}"
    console.print(text, style="bold yellow", markup=False, soft_wrap=True)


def lost_guarantees(differences: list[Difference]) -> list[str]:
    """Say what a run that is resumed with `differences` no longer is."""
    texts = [_LOST[_loss(key)].format(name=key.rpartition(".")[2]) for key, _, _ in differences]
    return list(dict.fromkeys(texts))


def _loss(key: str) -> OnResume:
    """Tell what is lost with a difference, by a setting's note or, of a fact, by what it is of."""
    note = note_of(key)
    if note in _LOST:
        return note
    if key.endswith(".optim"):
        return OnResume.LATER
    if ".data" in key or key.endswith(".batch_size"):
        return OnResume.VALIDATION if "validation" in key else OnResume.ORDER
    return OnResume.FORM if key == START or key.startswith("base.") else OnResume.ROUNDING


def note_of(key: str) -> OnResume | None:
    """Return what changing a setting on resume means; None for a fact that is no setting."""
    return next((one.on_resume for one in settings_of(Recipe) if one.key == key), None)


def stored_recipe(directory: Path) -> Recipe:
    """Read the recipe with which an artifact, or a checkpoint, was trained."""
    return read_recipe(directory / output.RECIPE)


def _concerns(key: str, stage: StageName) -> bool:
    """Tell whether a setting is one of those that `stage` depends on."""
    section, *names = key.split(".")
    return names[0] == stage if section == "stages" else section in SHARED[stage]


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
