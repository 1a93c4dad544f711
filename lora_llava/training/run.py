"""Run a recipe: train its stages in order, then evaluate the last artifact."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_llava.artifact import read_manifest
from lora_llava.data.questions import QuestionSet, load_questions
from lora_llava.errors import ArtifactError, RecipeError
from lora_llava.evaluation.compare import SAMPLES
from lora_llava.evaluation.figures import plot_loss
from lora_llava.evaluation.identity import differing_facts, evaluation_facts
from lora_llava.evaluation.run import Candidate, evaluate_artifact
from lora_llava.planning.preflight.run import check_setup
from lora_llava.planning.preflight.setup import Setup, Start
from lora_llava.recipe.file import load_recipe
from lora_llava.recipe.settings import Recipe
from lora_llava.run_directory import output
from lora_llava.run_directory.claim import claimed, place
from lora_llava.run_directory.lock import locked
from lora_llava.system.device import describe_device, memory_capped, peak_memory_bytes, reset_peak_memory
from lora_llava.system.files import shown_path, staged
from lora_llava.system.progress import phase, shown_on
from lora_llava.system.ranks import by_first, connected, entered_by_first, gathered, largest
from lora_llava.system.text import counted, listed
from lora_llava.training.checkpoints.differences import Resume
from lora_llava.training.checkpoints.resume import (
    as_finished,
    refuse_another_run,
    resume_finished,
)
from lora_llava.training.prepare import prepare_base
from lora_llava.training.stage import Stage
from lora_llava.training.train import train_stage

_EVALUATION_OF = "evaluation_of"
"""Key of the summary: what its evaluation depends on."""


def finetune(
    recipe: Recipe | Path | str,
    overrides: Sequence[str] = (),
    *,
    overwrite: bool = False,
    resume: Resume = "no",
    memory: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train and evaluate a recipe as `lora-llava finetune` does, preflight included.

    `recipe`: a loaded recipe, or a file, to which `overrides` ("stages.instruct.max_steps=20") apply. `memory`: bytes
    of the card to plan for; None: what is free. Returns the run's summary, which is also in `summary.json`. Raises
    LoraLlavaError's subclasses; PreflightError, before anything is written, with everything that would make the run
    fail.
    """
    file = None if isinstance(recipe, Recipe) else Path(recipe)
    if file is None and overrides:
        raise RecipeError("overrides apply to a recipe file, and this recipe is already loaded")
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    start: Start = "overwrite" if overwrite else "new" if resume == "no" else "resume"
    with connected(), shown_on(console) as shown:
        by_first(lambda: check_setup(Setup.of(loaded, start, file), shown))
        return run_recipe(loaded, shown, overwrite=overwrite, memory=memory, resume=resume)


def run_recipe(
    recipe: Recipe,
    console: Console,
    *,
    overwrite: bool = False,
    memory: int | None = None,
    resume: Resume = "no",
) -> dict[str, Any]:
    """Train every stage and, if the recipe has an evaluation, compare the last artifact with its base.

    `memory`: bytes of the card to plan for, and to stay within on CUDA; None: what is free. `resume`: continue the run
    in `output_dir` without repeating what is done. Returns the run's summary, which is also in `summary.json`: counts
    and metrics of each stage, `evaluation` (see `evaluation.compare`), seconds and peak memory in bytes by phase.
    Raises LoraLlavaError's subclasses; TrainingError if another run is using the directory.
    """
    asked = recipe.evaluation
    # Read the test data before training, so that a mistake in it shows at once and not hours later.
    questions = load_questions(asked.data, asked.broken_down_by) if asked else None
    directory = recipe.resolved_output_dir

    def claim() -> AbstractContextManager[None]:
        return claimed(directory, recipe.plain(), overwrite=overwrite, resume=resume != "no")

    with connected(), entered_by_first(lambda: locked(directory)), memory_capped(memory):
        if recipe.start_from is not None:
            _check_start(recipe.start_from)
        with entered_by_first(claim):
            summary = _train_stages(recipe, console, memory, resume)
        if questions is not None:
            _evaluate(recipe, questions, summary, console)
        elif output.EVALUATION in summary:
            console.print("evaluation: the recipe no longer has one; the earlier result is kept unchanged")
        return by_first(lambda: summary)


def _evaluate(recipe: Recipe, questions: QuestionSet, summary: dict[str, Any], console: Console) -> None:
    """Evaluate the last artifact, unless that was done with the same inputs; add the results to `summary`."""
    assert recipe.evaluation is not None
    directory = recipe.resolved_output_dir
    artifact = directory / recipe.stage_names[-1]
    facts = by_first(lambda: evaluation_facts(recipe, questions, artifact))
    if by_first(lambda: output.EVALUATION in summary):
        changed = by_first(lambda: differing_facts(summary.get(_EVALUATION_OF, {}), facts))
        if not changed:
            return
        console.print(f"evaluation: made again, because of a change in {listed(changed)}", markup=False)
    by_first(lambda: output.note_skipped(directory, output.EVALUATION, questions.skipped))
    clock = time.monotonic()
    reset_peak_memory()
    with entered_by_first(lambda: staged(directory / output.EVALUATION, partial(place, directory))) as staging:
        candidate = Candidate(artifact, precision=recipe.precision, start=recipe.start_from)
        summary["evaluation"] = evaluate_artifact(
            candidate, questions, recipe.evaluation, directory=staging, console=console
        )
    summary[_EVALUATION_OF] = facts
    summary["seconds"]["evaluation"] = round(time.monotonic() - clock, 1)
    _add_peak(summary, "evaluation", largest(peak_memory_bytes()))
    by_first(lambda: output.write_summary(directory, summary))


def _train_stages(recipe: Recipe, console: Console, memory: int | None, resume: Resume) -> dict[str, Any]:
    """Train every stage of `recipe` in its claimed directory; see `run_recipe`."""
    directory = recipe.resolved_output_dir
    summary = by_first(lambda: _open_summary(recipe, resume))
    summary = {"name": recipe.name, "seconds": {}, **summary, "hardware": _describe_hardware()}
    clock = time.monotonic()
    reset_peak_memory()
    phase("Preparing the base")
    base_directory, identity = by_first(lambda: prepare_base(recipe, directory, summary))
    summary["seconds"]["base"] = round(time.monotonic() - clock + summary["seconds"].get("base", 0), 1)
    _add_peak(summary, "base", peak_memory_bytes())
    parent = recipe.start_from
    for name in recipe.stage_names:
        # A base that the run assembled moves with the first checkpoint.
        base_directory = output.present_path(directory, base_directory)
        stage = Stage(recipe, name, base_directory, identity, parent)
        parent = stage.directory
        if by_first(partial(resume_finished, stage, summary, resume, console)):
            recipe = as_finished(stage)
            continue
        by_first(lambda: output.write_summary(directory, summary))
        reset_peak_memory()
        summary[name], seconds = train_stage(stage, console, memory=memory, resume=resume)
        summary.pop(output.EVALUATION, None)
        summary["seconds"][name] = round(seconds, 1)
        _add_peak(summary, name, summary[name]["peak_memory_bytes"])
        by_first(lambda: _plot_loss(directory))
    by_first(lambda: _close(recipe, summary))
    return summary


def _open_summary(recipe: Recipe, resume: Resume) -> dict[str, Any]:
    """Return the summary of the run to resume, after a check that it is this one; of a new run {}."""
    if resume == "no":
        output.write_recipe(recipe.resolved_output_dir, recipe)
        return {}
    refuse_another_run(recipe)
    return output.read_summary(recipe.resolved_output_dir)


def _describe_hardware() -> str:
    """Describe the devices of all processes, each kind once."""
    counts = Counter(gathered(describe_device()))
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counts.items())


def _plot_loss(directory: Path) -> None:
    with output.writing(directory, output.LOSS_PLOT) as picture:
        plot_loss(picture, output.read_log(directory))


def _close(recipe: Recipe, summary: dict[str, Any]) -> None:
    output.write_recipe(recipe.resolved_output_dir, recipe)
    output.write_summary(recipe.resolved_output_dir, summary)


def _add_peak(summary: dict[str, Any], phase_name: str, peak: int) -> None:
    """Add the peak memory of a phase, in bytes, to the summary; of several sessions the highest counts."""
    peaks = summary.setdefault("peak_memory_bytes_by_phase", {})
    peaks[phase_name] = max(peak, peaks.get(phase_name, 0))
    summary["peak_memory_bytes"] = max(peak, summary.get("peak_memory_bytes", 0))


def _check_start(artifact: Path) -> None:
    try:
        read_manifest(artifact)
    except ArtifactError as error:
        raise ArtifactError(f"start_from: {error}") from error


def print_outcome(recipe: Recipe, console: Console) -> None:
    """Print where the results of a run are."""
    directory = recipe.resolved_output_dir
    if (skipped := directory / output.SKIPPED).exists():
        count = len(skipped.read_text(encoding="utf-8").splitlines())
        verb = "was" if count == 1 else "were"
        line = f"{counted(count, 'bad record')} {verb} skipped; {output.SKIPPED} says which and why."
        console.print(f"\n{line}", style="bold yellow")
    names = [*recipe.stage_names, output.SUMMARY, output.LOSS_PLOT, f"{output.EVALUATION}/{SAMPLES}", output.SKIPPED]
    console.print(f"\nIn {shown_path(directory)}:", markup=False)
    for name in names:
        if (directory / name).exists():
            console.print(f"  {name}")


def print_next(recipe: Recipe, console: Console) -> None:
    """Print commands for the artifact of the last stage."""
    stage = recipe.stage_names[-1]
    artifact = shlex.quote(shown_path(recipe.resolved_output_dir / stage))
    commands = [f"chat {artifact} --image IMAGE"]
    if recipe.evaluation is None:
        commands.append(f"eval {artifact} --data FILE")
    commands.append(f"merge {artifact} {shlex.quote(f'{recipe.name}-merged')}")
    console.print("Next:")
    for command in commands:
        console.print(f"  lora-llava {command}", soft_wrap=True, markup=False, highlight=False)
