"""From a recipe to a trained and tested artifact: what both `finetune` and `quickstart` do."""

from __future__ import annotations

import gc
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console

from lora_llava.artifact import Usage, add_adapter, load_model, template_to_ask
from lora_llava.conversation import Template
from lora_llava.data.bad_records import BadRecord
from lora_llava.device import peak_memory_bytes, pick_device, pick_dtype
from lora_llava.errors import ArtifactError
from lora_llava.evaluation.compare import SAMPLES, Asking, Models, compare
from lora_llava.evaluation.identity import differing_facts, evaluation_facts
from lora_llava.evaluation.outcome import START
from lora_llava.evaluation.questions import QuestionSet, load_questions
from lora_llava.files import shown_path, staged
from lora_llava.progress import phase
from lora_llava.recipe import EvaluationSettings, Recipe
from lora_llava.run_directory import output
from lora_llava.run_directory.claim import place
from lora_llava.run_directory.lock import locked
from lora_llava.text import counted, listed
from lora_llava.training.differences import Resume
from lora_llava.training.run import run_recipe

_MADE_OF = "evaluation_of"
"""In the summary: what its evaluation was made of."""


def finetune_and_evaluate(
    recipe: Recipe,
    console: Console,
    *,
    overwrite: bool = False,
    memory: int | None = None,
    resume: Resume = "no",
) -> dict[str, Any]:
    """Train every stage and, if the recipe has an evaluation, compare the last artifact with its base.

    `resume`: go on with the run in `output_dir`; what it has done is not done again. Returns the run's summary, which
    is also in `summary.json`: what each stage saw and measured, `evaluation` (see `compare`), seconds by phase, and the
    peak memory in bytes. Raises LoraLlavaError's subclasses, TrainingError if another run is at work there.
    """
    settings = recipe.evaluation
    # Before training: a mistake in the test data must not come to light hours later.
    skipped: list[BadRecord] = []
    questions = load_questions(settings.data, settings.by, skipped) if settings else None
    directory = recipe.resolved_output_dir
    with locked(directory):
        summary = run_recipe(recipe, console, overwrite=overwrite, memory=memory, resume=resume)
        artifact = directory / recipe.stage_names[-1]
        if settings is None or questions is None:
            if output.EVALUATION in summary:
                console.print("evaluation: the recipe has none now; that of an earlier session stays as it is")
            return summary
        facts = evaluation_facts(recipe, questions, artifact)
        if output.EVALUATION in summary:
            changed = differing_facts(summary.get(_MADE_OF, {}), facts)
            if not changed:
                return summary
            console.print(f"evaluation: made again, since it was made with other {listed(changed)}", markup=False)
        output.note_skipped(directory, output.EVALUATION, skipped)
        clock = time.monotonic()
        results = directory / output.EVALUATION
        with staged(results, partial(place, directory)) as staging:
            summary["evaluation"] = evaluate_artifact(
                artifact,
                questions,
                settings,
                directory=staging,
                console=console,
                precision=recipe.precision,
                start=recipe.start_from,
            )
        summary[_MADE_OF] = facts
        summary["seconds"]["evaluation"] = round(time.monotonic() - clock, 1)
        summary["peak_memory_bytes"] = max(peak_memory_bytes(), summary.get("peak_memory_bytes", 0))
        output.write_summary(directory, summary)
        return summary


def evaluate_artifact(
    artifact: Path,
    questions: QuestionSet,
    settings: EvaluationSettings,
    *,
    directory: Path,
    console: Console,
    precision: str = "auto",
    compare_base: bool = True,
    base: str | None = None,
    template: str | None = None,
    start: Path | None = None,
) -> dict[str, Any]:
    """Load an artifact or a merged model, put questions to it in the form of its training, and score it.

    `base` replaces the path where the artifact says its base is; `start` is an artifact on the same base to compare
    with, such as the one that training started from. A merged model has neither. Returns what `compare` does.
    """
    # The trained model is no longer needed: on a small card there is no room for two.
    gc.collect()
    torch.cuda.empty_cache()
    device = pick_device()
    phase("Loading the model to ask")
    loaded, usage = load_model(
        artifact, device=device, dtype=pick_dtype(precision, device), base=base, template=template
    )
    is_adapter = isinstance(loaded.model, PeftModel)
    if start is not None and not is_adapter:
        raise ArtifactError(f"{artifact} is a whole model: there is no start on the same base to compare it with")
    tuned = _asking(usage, artifact)
    models = Models(
        loaded,
        tuned,
        start=None if start is None else _start_asking(_asking(add_adapter(loaded, start, START), start), tuned),
        base=compare_base and is_adapter,
    )
    return compare(models, questions, settings, directory, console)


def _asking(usage: Usage, directory: Path) -> Asking:
    return Asking(template_to_ask(usage, directory), usage.image_aspect_ratio)


def _start_asking(start: Asking, tuned: Asking) -> Asking:
    """Return the form in which to ask a start: that of its training, unless that held no question."""
    return tuned if isinstance(start.template, Template) and start.template.caption_only else start


def print_outcome(recipe: Recipe, console: Console) -> None:
    """Say where the results of a run are."""
    directory = recipe.resolved_output_dir
    if (skipped := directory / output.SKIPPED).exists():
        count = len(skipped.read_text(encoding="utf-8").splitlines())
        were = f"{counted(count, 'bad record')} {'was' if count == 1 else 'were'} skipped"
        console.print(f"\n{were}; {output.SKIPPED} says which and why.", style="bold yellow")
    places = [*recipe.stage_names, output.SUMMARY, output.LOSS_PLOT, f"{output.EVALUATION}/{SAMPLES}", output.SKIPPED]
    console.print(f"\nIn {shown_path(directory)}:")
    for name in places:
        if (directory / name).exists():
            console.print(f"  {name}")
