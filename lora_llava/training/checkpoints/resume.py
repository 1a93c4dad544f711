"""Where a run goes on: which stages are finished, and from which checkpoint the one that is not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_llava.artifact import Manifest, file_sha256, read_manifest
from lora_llava.data.images.fingerprint import picture_facts
from lora_llava.data.load import fingerprint, load_split
from lora_llava.errors import ArtifactError, DataError, TrainingError
from lora_llava.formats.peft_adapter import WEIGHTS
from lora_llava.modeling.base import BaseIdentity
from lora_llava.planning.memory import Recompute
from lora_llava.planning.memory_plan import MemoryPlan
from lora_llava.recipe.fields import OnResume, settings_of, value_at
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.stages import StageName
from lora_llava.run_directory import output
from lora_llava.run_directory.written import current
from lora_llava.system.files import shown_path
from lora_llava.system.text import counted
from lora_llava.training.checkpoints.differences import (
    IMAGES,
    SHARED,
    Difference,
    Resume,
    changed_facts,
    changed_settings,
    differing_values,
    refuse_or_say,
    stored_recipe,
)
from lora_llava.training.checkpoints.files import Checkpoint, latest


def checkpoints_of(recipe: Recipe, stage: StageName) -> Path:
    """Return the directory of a stage's checkpoints."""
    return recipe.resolved_output_dir / output.CHECKPOINTS / stage


def find_checkpoint(recipe: Recipe, stage: StageName, resume: Resume, console: Console) -> Checkpoint | None:
    """Find where a stage goes on, None if at its beginning.

    Raises TrainingError if the stage has checkpoints and none is whole.
    """
    if resume == "no":
        return None

    def say(line: str) -> None:
        console.print(f"{stage}: {line}", style="bold yellow", markup=False, soft_wrap=True)

    found = latest(checkpoints_of(recipe, stage), say)
    where = f"going on after step {found.progress.step:,}" if found else "no checkpoint yet, from the beginning"
    console.print(f"{stage}: {where}")
    return found


def take_up(recipe: Recipe, stage: StageName, found: Checkpoint | None) -> None:
    """Note the recipe of what follows, and cut away what the log says of steps that are trained again."""
    directory = recipe.resolved_output_dir
    output.write_recipe(directory, recipe)
    if found is None:
        output.drop_from_log(directory, stage)
    else:
        output.cut_log(directory, found.progress.log_bytes)


def stored_memory_plan(
    checkpoint: Checkpoint | None, recipe: Recipe, stage: StageName, memory: int | None
) -> MemoryPlan | None:
    """Return the memory plan that a checkpoint was trained with: another would add up in another order.

    None without a checkpoint, or if another memory, or other settings, are asked for now.
    """
    if checkpoint is None or memory is not None:
        return None
    if differing_values(_planned_keys(stage), stored_recipe(checkpoint.directory), recipe):
        return None
    fields = checkpoint.memory_plan
    return MemoryPlan(**{**fields, "recompute": Recompute(**fields["recompute"])})


def _planned_keys(stage: StageName) -> list[str]:
    """List the settings that the memory plan decides where they are `auto`."""
    keys = [one.key for one in settings_of(Recipe) if one.on_resume is OnResume.RESOLVED]
    stages = [key for key in keys if key.startswith(f"stages.{stage}.") and not key.endswith(".batch_size")]
    return [*stages, "quantization.keep_dequantized"]


def check_unchanged(
    checkpoint: Checkpoint | None,
    recipe: Recipe,
    facts: Mapping[str, Any],
    num_steps: int,
    resume: Resume,
    console: Console,
) -> bool:
    """Compare a checkpoint with the run that is to go on from it; return whether they are the same.

    Raises TrainingError as `refuse_or_say` does, and if the plan has fewer steps now than were trained.
    """
    if checkpoint is None:
        return True
    stage, step = checkpoint.progress.stage, checkpoint.progress.step
    # Older checkpoints know batch_size as a setting alone.
    key = f"stages.{stage}.batch_size"
    before = {key: value_at(stored_recipe(checkpoint.directory), key), **checkpoint.facts}
    differences = changed_settings(checkpoint.directory, recipe, stage) + changed_facts(before, facts)
    refuse_or_say(differences, stage, checkpoint.directory, recipe, resume, console)
    if step > num_steps:
        raise TrainingError(f"stage {stage} has {counted(num_steps, 'step')} now, and {step:,} were trained already")
    return not differences


def is_finished(directory: Path, stage: StageName, identity: BaseIdentity, parent: Path | None) -> bool:
    """Tell whether `directory` holds the artifact of a stage, trained to its end on this base, from this parent.

    Raises TrainingError if it holds one that is damaged, or that was trained from other weights.
    """
    if not directory.exists():
        return False
    again = f"remove {shown_path(directory)} to have it made again from the stage's last checkpoint"
    try:
        manifest = read_manifest(directory)
    except ArtifactError as error:
        raise TrainingError(f"{error}; {again}") from error
    wanted = {
        "stage": (manifest.stage, stage),
        "base": (manifest.base["weights_sha256"], identity.weights_sha256),
        "parent_sha256": (manifest.parent_sha256, file_sha256(parent / WEIGHTS) if parent else None),
    }
    for key, (found, expected) in wanted.items():
        if found != expected:
            # Its checkpoints are of the same base and parent: to train from them again would be refused as well.
            changed = {"base": "the base's weights", "parent_sha256": "the artifact it was trained from"}.get(key, key)
            raise TrainingError(
                f"{shown_path(directory)} was trained from other weights: {changed} changed since ({found} then, "
                f"{expected} now). Put the old ones back, or start a new run with another output_dir"
            )
    return True


def resume_finished(
    recipe: Recipe,
    stage: StageName,
    identity: BaseIdentity,
    parent: Path | None,
    summary: dict[str, Any],
    resume: Resume,
    console: Console,
) -> bool:
    """Tell whether a stage was trained to its end, and note in `summary` what is known of it.

    Raises TrainingError as `is_finished` and `refuse_or_say` do.
    """
    artifact = recipe.resolved_output_dir / stage
    if resume == "no" or not is_finished(artifact, stage, identity, parent):
        return False
    manifest = read_manifest(artifact)
    differences = changed_settings(artifact, recipe, stage, finished=True)
    if recipe.stage(stage).batch_size == manifest.seen.get("batch_size"):
        # `auto` then, and now what it came to.
        differences = [one for one in differences if one[0] != f"stages.{stage}.batch_size"]
    differences += changed_data(artifact, recipe, stage, manifest, console)
    refuse_or_say(differences, stage, artifact, recipe, resume, console, finished=True)
    output.write_card(recipe.resolved_output_dir, stage, recipe)
    # A run that was killed between the artifact and its summary knows less of it.
    summary.setdefault(stage, {**manifest.seen, **manifest.metrics})
    console.print(f"{stage}: trained already")
    return True


def refuse_another_run(recipe: Recipe) -> None:
    """Raise TrainingError if a recipe is not of the run in its directory, in what no resumed run can change.

    That is its name, its stages, and what its base was assembled from.
    """
    directory = recipe.resolved_output_dir
    before = stored_recipe(current(directory))
    now, then = recipe.stage_names, before.stage_names
    if now[: len(then)] != then:
        raise TrainingError(
            f"stages: {', '.join(then)} then, {', '.join(now)} now. A run can be extended by the stage that follows; "
            "for other stages start a new run with another output_dir"
        )
    keys = [one.key for one in settings_of(Recipe) if one.on_resume is OnResume.FIXED]
    keys = [key for key in keys if not key.startswith(("stages.", "adapter."))]
    if recipe.base.model_name_or_path is None:
        # A fresh projector is drawn by it.
        keys.append("seed")
    differing = [f"  {key}: {then} then, {now} now" for key, then, now in differing_values(keys, before, recipe)]
    if differing:
        raise TrainingError(
            "\n".join([f"{shown_path(directory)} is a run of another recipe:", *differing])
            + "\nSet these back, or start a new run with another output_dir."
        )


def as_finished(recipe: Recipe, stage: StageName) -> Recipe:
    """Return the recipe with the settings by which a finished stage was trained, so that nothing else is stated.

    If it is the last one, the sections that stages share are those of its training, too.
    """
    stored = stored_recipe(recipe.resolved_output_dir / stage)
    stages = recipe.stages.model_copy(update={stage: stored.stage(stage)})
    shared = SHARED[stage] if stage == recipe.stage_names[-1] else ()
    return recipe.model_copy(update={"stages": stages, **{name: getattr(stored, name) for name in shared}})


def changed_data(
    artifact: Path, recipe: Recipe, stage: StageName, manifest: Manifest, console: Console
) -> list[Difference]:
    """List how the data of a finished stage differ from those that it was trained on, and by which settings.

    Data that are gone, with settings that did not change, are not compared, and that is said.
    """
    key, data = f"stages.{stage}", recipe.stage(stage).data
    keys = [one.key for one in settings_of(Recipe) if one.on_resume is OnResume.SAME_CONTENT]
    moved = differing_values([one for one in keys if one.startswith(f"{key}.data.")], stored_recipe(artifact), recipe)
    known = manifest.data
    try:
        train, validation = load_split(data, recipe.seed)
        # Which records cannot be used is found out with the tokenizer, which is not loaded for this.
        reason = "bad ones were skipped" if known.get("skipped_records") else None
    except DataError as error:
        if moved:
            other = ", ".join(one for one, _, _ in moved)
            raise TrainingError(f"stage {stage} is finished; its data, with other {other}: {error}") from error
        reason = str(error)
    if reason is not None:
        console.print(f"{stage}: its records are not compared with those it was trained on: {reason}", markup=False)
        return moved
    facts = {
        f"{key}.data (number of records)": (known.get("records"), len(train)),
        f"{key}.data (sha256 of the records)": (known.get("sha256"), fingerprint(train)),
        f"{key}.data.validation (sha256 of the records)": (known.get("validation_sha256"), fingerprint(validation)),
        f"{key}.{IMAGES}": (known.get("images"), picture_facts([*train, *validation])),
    }
    # What an older version did not note is not compared.
    noted = {one: pair for one, pair in facts.items() if pair[0] is not None}
    changed = changed_facts(
        {one: then for one, (then, _) in noted.items()}, {one: now for one, (_, now) in noted.items()}
    )
    return [*moved, *changed] if changed else []
