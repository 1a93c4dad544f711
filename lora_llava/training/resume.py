"""Where a run goes on: which stages are finished, and from which checkpoint the one that is not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_llava.artifact import MANIFEST, WEIGHTS, file_sha256, read_manifest
from lora_llava.errors import ArtifactError, TrainingError
from lora_llava.files import shown_path
from lora_llava.modeling.base import BaseIdentity
from lora_llava.recipe import Recipe
from lora_llava.recipe_stages import StageName
from lora_llava.run_directory import output
from lora_llava.training.checkpoint import Checkpoint, latest
from lora_llava.training.differences import (
    RESOLVED,
    Resume,
    changed_settings,
    flat_settings,
    refuse_or_say,
    stored_recipe,
)
from lora_llava.training.memory import Recompute
from lora_llava.training.memory_plan import MemoryPlan


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
    before, now = flat_settings(stored_recipe(checkpoint.directory)), flat_settings(recipe)
    keys = ["quantization.keep_dequantized", *(f"stages.{stage}.{key}" for key in RESOLVED)]
    if any(before.get(key) != now.get(key) for key in keys):
        return None
    fields = checkpoint.memory_plan
    return MemoryPlan(**{**fields, "recompute": Recompute(**fields["recompute"])})


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
    before = {**flat_settings(stored_recipe(checkpoint.directory)), **checkpoint.facts}
    differences = [one for one in changed_settings(checkpoint.directory, recipe, stage) if one[0] not in facts]
    differences += [(key, before.get(key), now) for key, now in facts.items() if before.get(key) != now]
    refuse_or_say(differences, stage, checkpoint.directory, recipe, resume, console)
    if step > num_steps:
        raise TrainingError(f"stage {stage} has {num_steps:,} steps now, and {step:,} were trained already")
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
            raise TrainingError(f"{directory / MANIFEST}: {key} is {found}, of this run {expected}; {again}")
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
    differences = changed_settings(artifact, recipe, stage)
    if recipe.stage(stage).batch_size == manifest.seen.get("batch_size"):
        # `auto` then, and now what it came to.
        differences = [one for one in differences if one[0] != f"stages.{stage}.batch_size"]
    refuse_or_say(differences, stage, artifact, recipe, resume, console)
    # A run that was killed between the artifact and its summary knows less of it.
    summary.setdefault(stage, {**manifest.seen, **manifest.metrics})
    console.print(f"{stage}: trained already")
    return True
