"""Compare what a stage depends on with what its artifact or checkpoint was trained with; refuse or report changes."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from lora_llava.artifact import library_versions
from lora_llava.data.images.fingerprint import picture_facts, same_pictures
from lora_llava.data.load import fingerprint
from lora_llava.data.pairs import rejected_fingerprint
from lora_llava.data.stage import StageData
from lora_llava.errors import TrainingError
from lora_llava.formats.names import WEIGHTS
from lora_llava.planning.memory_plan import MemoryPlan, StageShapes
from lora_llava.planning.speed import Machine
from lora_llava.recipe.fields import OnResume, settings_of, value_at
from lora_llava.recipe.file import one_line, read_recipe
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.stages import StageName, trains_lora
from lora_llava.run_directory import output
from lora_llava.system.files import file_sha256, shown_path
from lora_llava.system.ranks import world_size
from lora_llava.system.text import counted, dtype_name
from lora_llava.training.stage import Stage

Resume = Literal["no", "exact", "anyway"]
"""Start a run; resume it if nothing changed; resume it whatever changed."""

Difference = tuple[str, Any, Any]
"""Key, value then, value now."""

_LOST = {
    OnResume.FORM: "one format for the whole stage: {name} applies from here on",
    OnResume.LATER: "one {name} for the whole stage: it applies from here on",
    OnResume.ROUNDING: "results that are bit-identical to an uninterrupted run",
    OnResume.VALIDATION: "validation losses that are comparable with the earlier ones",
    OnResume.ORDER: "each record exactly once per epoch: training continues at the same step of a new plan",
}
"""What a run loses when it is resumed with a changed setting of this class."""
_COMPARED = {*_LOST, OnResume.FIXED}
"""Classes compared by value in an unfinished stage. The others may change, or `run_facts` has what they resolve to."""
_COMPARED_IF_FINISHED = {*_COMPARED, OnResume.RESOLVED, OnResume.FREE}
BASE, START = "base (its weights)", "start_from (its weights)"
IMAGES = "data (images)"
PROCESSES = "processes"


def run_facts(stage: Stage, shapes: StageShapes, data: StageData, plan: MemoryPlan, machine: Machine) -> dict[str, Any]:
    """Return what a stage depends on besides its settings, under the recipe key where there is one."""
    key = stage.key
    return {
        BASE: stage.base.weights_sha256,
        "base.vision_feature_layer": shapes.config.vision_feature_layer,
        "base.vision_feature_select_strategy": shapes.config.vision_feature_select_strategy,
        START: file_sha256(stage.parent / WEIGHTS) if stage.parent else None,
        f"{key}.data (number of records)": len(data.encoded),
        f"{key}.data (sha256 of the records)": fingerprint(data.encoded.records),
        f"{key}.data.validation (sha256 of the records)": fingerprint(data.validation.records),
        **_pair_facts(key, data),
        f"{key}.batch_size": data.length.batch_size,
        f"{key}.{IMAGES}": picture_facts([*data.encoded.records, *data.validation.records]),
        f"{key}.tokens_per_micro_batch": plan.tokens_per_micro_batch,
        f"{key}.gradient_checkpointing": str(plan.recompute),
        f"{key}.optim": plan.optim,
        # None, as in checkpoints that were written before there were graphs.
        f"{key}.cuda_graphs": "on" if plan.graphs else None,
        "quantization.keep_dequantized": plan.keep_dequantized,
        "attn_implementation": machine.attention,
        "precision": dtype_name(shapes.dtype),
        "device": machine.device,
        PROCESSES: world_size(),
        **{f"version of {name}": version for name, version in library_versions().items()},
    }


def _pair_facts(key: str, data: StageData) -> dict[str, str]:
    """Return the facts about rejected answers; {} for records without them, as before there were any."""
    parts = {f"{key}.data": data.encoded, f"{key}.data.validation": data.validation}
    return {
        f"{name} (sha256 of the rejected answers)": rejected_fingerprint(part.records)
        for name, part in parts.items()
        if part.are_pairs
    }


def changed_facts(before: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Difference]:
    """List the facts that changed. Image files are not compared where an older version did not record them."""
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
    """Describe image files briefly, in a text that differs whenever the files do."""
    return f"{counted(facts['files'], 'file')}, {facts['bytes']:,} bytes, sha256 {facts['content'] or facts['times']}"


def changed_settings(directory: Path, stage: Stage, *, finished: bool = False) -> list[Difference]:
    """List the settings of `stage` that differ from those of the artifact or checkpoint in `directory`.

    If the stage is `finished`, include those that affect only logging or speed: they would have no effect.
    """
    compared = _COMPARED_IF_FINISHED if finished else _COMPARED
    changeable = [setting.key for setting in settings_of(Recipe) if setting.on_resume in compared]
    keys = [key for key in changeable if _affects(key, stage.name)]
    if finished and stage.is_last:
        keys += ["report_to", "distributed.shard", "distributed.engine", "distributed.offload"]
    return differing_values(keys, stored_recipe(directory), stage.recipe)


def differing_values(keys: Iterable[str], before: Recipe, now: Recipe) -> list[Difference]:
    """List the settings that differ between two recipes, with both values."""
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
    """Raise TrainingError if there are differences; with `--resume-anyway`, print the lost guarantees instead.

    `directory`: the artifact or checkpoint that differs from the run.
    """
    if not differences:
        return
    lines = [f"  {key}: {_shown(before)} then, {_shown(now)} now" for key, before, now in differences]
    no_effect = ". The stage is finished, so these have no effect" if finished else ""
    head = f"stage {stage.name} has changed since {shown_path(directory)} was written{no_effect}:"
    listed = "\n".join([head, *lines])
    fixed = [key for key, _, _ in differences if key == BASE or _note_of(key) is OnResume.FIXED]
    if fixed:
        raise TrainingError(
            f"{listed}\nThe weights trained so far do not fit another {', '.join(fixed)}. Set these back, or start a "
            "new run with another output_dir."
        )
    lost = [f"these settings: {shown_path(directory)} stays unchanged"] if finished else _lost_guarantees(differences)
    if resume != "anyway":
        start = shlex.quote(f"start_from={one_line(shown_path(directory))}")
        further = f" To train further, or on other data, start a new run with {start}."
        raise TrainingError(
            f"{listed}\nSet these back to resume exactly: {shown_path(stage.run_directory)}/"
            f"{output.RECIPE} is the recipe of the run. Or resume with --resume-anyway, which gives up: "
            f"{'; '.join(lost)}.{further if finished else ''}"
        )
    text = f"{listed}\nresumed anyway, which gives up: {'; '.join(lost)}"
    console.print(text, style="bold yellow", markup=False, soft_wrap=True)


def _lost_guarantees(differences: list[Difference]) -> list[str]:
    """List what a run that is resumed with `differences` loses."""
    texts = [_LOST[_loss(key)].format(name=key.rpartition(".")[2]) for key, _, _ in differences]
    return list(dict.fromkeys(texts))


def _loss(key: str) -> OnResume:
    """Return the class of a difference: the setting's own, or for a fact the class it belongs to."""
    note = _note_of(key)
    if note in _LOST:
        return note
    if key.endswith(".optim"):
        return OnResume.LATER
    if key.endswith(IMAGES):
        # The records are the same, and so is their order.
        return OnResume.ROUNDING
    if ".data" in key or key.endswith(".batch_size"):
        return OnResume.VALIDATION if "validation" in key else OnResume.ORDER
    return OnResume.FORM if key == START or key.startswith("base.") else OnResume.ROUNDING


def _note_of(key: str) -> OnResume | None:
    """Return what changing a setting on resume means; None for a fact that is not a setting."""
    return next((setting.on_resume for setting in settings_of(Recipe) if setting.key == key), None)


def stored_recipe(directory: Path) -> Recipe:
    """Read the recipe that an artifact, or a checkpoint, was trained with."""
    return read_recipe(directory / output.RECIPE)


def shared_sections(stage: StageName) -> list[str]:
    """List the settings and sections outside `stages` that training `stage` depends on."""
    classes = _COMPARED | {OnResume.RESOLVED}
    sections = dict.fromkeys(one.key.partition(".")[0] for one in settings_of(Recipe) if one.on_resume in classes)
    without = {"stages"} if trains_lora(stage) else {"stages", "adapter"}
    return [section for section in sections if section not in without]


def _affects(key: str, stage: StageName) -> bool:
    """Tell whether `stage` depends on a setting."""
    section, *names = key.split(".")
    return names[0] == stage if section == "stages" else section in shared_sections(stage)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
