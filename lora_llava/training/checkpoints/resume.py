"""Resume a run: find the finished stages and the checkpoint of the next one, and check that nothing else changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_llava.artifact import Manifest, read_manifest
from lora_llava.data.images.fingerprint import picture_facts
from lora_llava.data.load import fingerprint, load_split
from lora_llava.errors import ArtifactError, DataError, TrainingError
from lora_llava.formats.names import WEIGHTS
from lora_llava.modeling.identity import check_base_files
from lora_llava.planning.memory import Recompute
from lora_llava.planning.memory_plan import MemoryPlan
from lora_llava.planning.speed import ASSUMED, Speed
from lora_llava.recipe.fields import OnResume, settings_of, value_at
from lora_llava.recipe.settings import Recipe
from lora_llava.run_directory import output
from lora_llava.run_directory.written import current
from lora_llava.system.files import file_sha256, shown_path
from lora_llava.system.text import counted
from lora_llava.training.checkpoints.differences import (
    IMAGES,
    PROCESSES,
    Difference,
    Resume,
    changed_facts,
    changed_settings,
    differing_values,
    refuse_or_warn,
    shared_sections,
    stored_recipe,
)
from lora_llava.training.checkpoints.files import Checkpoint, find_latest
from lora_llava.training.stage import Stage


def find_checkpoint(stage: Stage, resume: Resume, console: Console) -> Checkpoint | None:
    """Find the latest complete checkpoint of a stage; None to start from its beginning.

    Raises TrainingError if the stage has checkpoints but none is complete.
    """
    if resume == "no":
        return None

    def warn(line: str) -> None:
        console.print(f"{stage.name}: {line}", style="bold yellow", markup=False, soft_wrap=True)

    checkpoint = find_latest(stage.checkpoints, warn)
    start = f"resuming after step {checkpoint.progress.step:,}" if checkpoint else "no checkpoint yet, from the start"
    console.print(f"{stage.name}: {start}")
    return checkpoint


def prepare_log(stage: Stage, checkpoint: Checkpoint | None) -> None:
    """Save the resumed recipe, and truncate the log to the checkpoint."""
    output.write_recipe(stage.run_directory, stage.recipe)
    if checkpoint is None:
        output.drop_from_log(stage.run_directory, stage.name)
    else:
        output.cut_log(stage.run_directory, checkpoint.progress.log_bytes)


def stored_memory_plan(checkpoint: Checkpoint | None, stage: Stage, usable: int | None) -> MemoryPlan | None:
    """Return the memory plan of a checkpoint, since another plan would sum gradients in another order.

    `usable`: bytes to plan with, if the user gives the memory. None without a checkpoint, or if the user now gives
    other memory or other settings for the plan.
    """
    if checkpoint is None or usable not in (None, checkpoint.memory_plan["bytes_usable"]):
        return None
    if differing_values(_planned_keys(stage), stored_recipe(checkpoint.directory), stage.recipe):
        return None
    fields = {**checkpoint.memory_plan, "speed": stored_speed(checkpoint)}
    return MemoryPlan(**{**fields, "recompute": Recompute(**fields["recompute"])})


def stored_speed(checkpoint: Checkpoint) -> Speed:
    """Return the speed that a checkpoint was planned with; earlier versions assumed it and did not record it."""
    if "speed" in checkpoint.memory_plan:
        return Speed(**checkpoint.memory_plan["speed"])
    return ASSUMED[checkpoint.facts["device"]]


def _planned_keys(stage: Stage) -> list[str]:
    """List the settings that the memory plan resolves if they are `auto`."""
    prefix = f"{stage.key}."
    keys = [key for key in _keys_of(OnResume.RESOLVED) if key.startswith(prefix) and not key.endswith(".batch_size")]
    return [*keys, "quantization.keep_dequantized"]


def _keys_of(on_resume: OnResume) -> list[str]:
    return [setting.key for setting in settings_of(Recipe) if setting.on_resume is on_resume]


def check_unchanged(
    checkpoint: Checkpoint | None,
    stage: Stage,
    facts: Mapping[str, Any],
    num_steps: int,
    resume: Resume,
    console: Console,
) -> bool:
    """Compare a checkpoint with the run that resumes from it; return whether nothing changed.

    Another number of processes, or another engine that adds up their gradients, is no change: a step holds the same
    conversations. Raises TrainingError as `refuse_or_warn` does, and if the stage now has fewer steps than were
    trained.
    """
    if checkpoint is None:
        return True
    step = checkpoint.progress.step
    _check_base_files(stage, checkpoint.directory)
    # Older checkpoints have batch_size only as a setting.
    key, recipe = f"{stage.key}.batch_size", stored_recipe(checkpoint.directory)
    before = {key: value_at(recipe, key), **checkpoint.facts}
    changed = changed_settings(checkpoint.directory, stage) + changed_facts(before, facts)
    differences = [difference for difference in changed if difference[0] != PROCESSES]
    refuse_or_warn(differences, stage, checkpoint.directory, resume, console)
    if step > num_steps:
        raise TrainingError(
            f"stage {stage.name} has {counted(num_steps, 'step')} now, and {step:,} were trained already"
        )
    rounding = []
    if differences != changed:
        rounding.append(f"{counted(before[PROCESSES], 'process', 'processes')} then, {facts[PROCESSES]} now")
    engines = _engine(recipe, before[PROCESSES]), _engine(stage.recipe, facts[PROCESSES])
    if engines[0] != engines[1]:
        rounding.append(f"distributed.engine: {engines[0]} then, {engines[1]} now")
    if rounding:
        text = "; ".join(rounding)
        console.print(f"{stage.name}: {text}: the steps hold the same conversations, and their sums round differently")
    elif not differences:
        console.print(f"{stage.name}: data, settings and versions are those of the checkpoint: the run resumes exactly")
    return not differences


def _engine(recipe: Recipe, processes: int) -> str:
    """Return what adds up the gradients of a run with this number of processes."""
    return recipe.distributed.engine if processes > 1 else "torch"


def _finished(stage: Stage) -> Manifest | None:
    """Return the manifest of the stage's artifact, which was trained to its end; None if the run has none.

    Raises TrainingError if the artifact is damaged, or was trained from another base or another parent.
    """
    directory = stage.directory
    if not directory.exists():
        return None
    advice = f"remove {shown_path(directory)} to have it made again from the stage's last checkpoint"
    try:
        manifest = read_manifest(directory)
    except ArtifactError as error:
        raise TrainingError(f"{error}; {advice}") from error
    compared = {
        "stage": (manifest.stage, stage.name),
        "base": (manifest.base["weights_sha256"], stage.base.weights_sha256),
        "parent_sha256": (manifest.parent_sha256, file_sha256(stage.parent / WEIGHTS) if stage.parent else None),
    }
    for key, (stored, expected) in compared.items():
        if stored != expected:
            # Its checkpoints have the same base and parent, so resuming from them would be refused as well.
            changed = {"base": "the base's weights", "parent_sha256": "the artifact it was trained from"}.get(key, key)
            raise TrainingError(
                f"{shown_path(directory)} was trained from other weights: {changed} changed since ({stored} then, "
                f"{expected} now). Put the old ones back, or start a new run with another output_dir"
            )
    _check_base_files(stage, directory)
    return manifest


def _check_base_files(stage: Stage, directory: Path) -> None:
    """Raise TrainingError if the base is not the one that an artifact, or a checkpoint, of the run was trained on."""
    try:
        manifest = asdict(read_manifest(directory))
        check_base_files(manifest, stage.base.fields, shown_path(stage.base_directory), directory, training=True)
    except ArtifactError as error:
        raise TrainingError(f"{error} Or start a new run with another output_dir.") from error


def resume_finished(stage: Stage, summary: dict[str, Any], resume: Resume, console: Console) -> bool:
    """Tell whether a stage is finished, and add what is known of it to `summary`.

    Raises TrainingError as `_finished` and `refuse_or_warn` do.
    """
    if resume == "no" or (manifest := _finished(stage)) is None:
        return False
    differences = changed_settings(stage.directory, stage, finished=True)
    if stage.settings.batch_size == manifest.seen.get("batch_size"):
        # It was `auto`, and is now the number that `auto` chose.
        differences = [difference for difference in differences if difference[0] != f"{stage.key}.batch_size"]
    differences += _changed_data(stage, manifest, console)
    refuse_or_warn(differences, stage, stage.directory, resume, console, finished=True)
    output.write_card(stage.run_directory, stage.name, stage.recipe)
    # Missing if the run was killed between the artifact and its summary; the manifest has less.
    summary.setdefault(stage.name, {**manifest.seen, **manifest.metrics})
    console.print(f"{stage.name}: trained already")
    return True


def refuse_another_run(recipe: Recipe) -> None:
    """Raise TrainingError if a recipe differs from the run in its directory in what a resumed run cannot change.

    That is its name, its stages, and the parts of its base.
    """
    directory = recipe.resolved_output_dir
    before = stored_recipe(current(directory))
    now, then = recipe.stage_names, before.stage_names
    if now[: len(then)] != then:
        raise TrainingError(
            f"stages: {', '.join(then)} then, {', '.join(now)} now. A run can be extended by the stage that follows; "
            "for other stages start a new run with another output_dir"
        )
    keys = [key for key in _keys_of(OnResume.FIXED) if not key.startswith(("stages.", "adapter."))]
    if recipe.base.model_name_or_path is None:
        # It initializes a fresh projector.
        keys.append("seed")
    differing = [f"  {key}: {then} then, {now} now" for key, then, now in differing_values(keys, before, recipe)]
    if differing:
        raise TrainingError(
            "\n".join([f"{shown_path(directory)} is a run of another recipe:", *differing])
            + "\nSet these back, or start a new run with another output_dir."
        )


def as_finished(stage: Stage) -> Recipe:
    """Return the recipe with the settings that a finished stage was trained with, to save with the run.

    If it is the last stage, the sections that stages share are those of its training, too.
    """
    stored = stored_recipe(stage.directory)
    stages = stage.recipe.stages.model_copy(update={stage.name: stored.stage(stage.name)})
    shared = shared_sections(stage.name) if stage.is_last else ()
    return stage.recipe.model_copy(update={"stages": stages, **{name: getattr(stored, name) for name in shared}})


def _changed_data(stage: Stage, manifest: Manifest, console: Console) -> list[Difference]:
    """List the changes in the data of a finished stage, and in the settings that name it.

    If the data is gone and its settings did not change, it is not compared, which is printed.
    """
    key, data = stage.key, stage.settings.data
    keys = [name for name in _keys_of(OnResume.SAME_CONTENT) if name.startswith(f"{key}.data.")]
    moved = differing_values(keys, stored_recipe(stage.directory), stage.recipe)
    known = manifest.data
    try:
        train, validation = load_split(data, stage.recipe.seed)
        # Finding the bad records would need the tokenizer.
        reason = "bad ones were skipped" if known.get("skipped_records") else None
    except DataError as error:
        if moved:
            changed_keys = ", ".join(name for name, _, _ in moved)
            raise TrainingError(
                f"stage {stage.name} is finished; its data, after a change of {changed_keys}: {error}"
            ) from error
        reason = str(error)
    if reason is not None:
        console.print(
            f"{stage.name}: its records are not compared with those it was trained on: {reason}", markup=False
        )
        return moved
    facts = {
        f"{key}.data (number of records)": (known.get("records"), len(train)),
        f"{key}.data (sha256 of the records)": (known.get("sha256"), fingerprint(train)),
        f"{key}.data.validation (sha256 of the records)": (known.get("validation_sha256"), fingerprint(validation)),
        f"{key}.{IMAGES}": (known.get("images"), picture_facts([*train, *validation])),
    }
    # Facts that an older version did not record are not compared.
    then = {name: before for name, (before, _) in facts.items() if before is not None}
    changed = changed_facts(then, {name: now for name, (_, now) in facts.items() if name in then})
    return [*moved, *changed] if changed else []
