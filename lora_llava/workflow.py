"""From a recipe to a trained and tested artifact: what both `finetune` and `quickstart` do."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console

from lora_llava.artifact import load_model, template_to_ask
from lora_llava.data.bad_records import BadRecord
from lora_llava.data.records import Record, load_records
from lora_llava.device import peak_memory_bytes, pick_device, pick_dtype
from lora_llava.evaluation.compare import SAMPLES, compare
from lora_llava.files import shown_path, staged
from lora_llava.recipe import Recipe
from lora_llava.run_directory import output
from lora_llava.run_directory.claim import place
from lora_llava.run_directory.lock import locked
from lora_llava.training.differences import Resume
from lora_llava.training.run import run_recipe


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
    records = load_records(settings.data, skipped) if settings else []
    directory = recipe.resolved_output_dir
    with locked(directory):
        summary = run_recipe(recipe, console, overwrite=overwrite, memory=memory, resume=resume)
        if settings is None or output.EVALUATION in summary:
            return summary
        output.note_skipped(directory, output.EVALUATION, skipped)
        clock = time.monotonic()
        results = directory / output.EVALUATION
        with staged(results, partial(place, directory)) as staging:
            summary["evaluation"] = evaluate_artifact(
                directory / recipe.stage_names[-1],
                records,
                directory=staging,
                console=console,
                precision=recipe.precision,
                max_new_tokens=settings.max_new_tokens,
                max_rows=settings.batch_size,
                blind_questions=settings.blind_questions,
            )
        summary["seconds"]["evaluation"] = round(time.monotonic() - clock, 1)
        summary["peak_memory_bytes"] = peak_memory_bytes()
        output.write_summary(directory, summary)
        return summary


def evaluate_artifact(
    artifact: Path,
    records: Sequence[Record],
    *,
    directory: Path,
    console: Console,
    precision: str,
    max_new_tokens: int,
    max_rows: int,
    blind_questions: int | None,
    compare_base: bool = True,
    base: str | None = None,
    template: str | None = None,
) -> dict[str, Any]:
    """Load an artifact or a merged model, ask it `records` in the form of its training, and score it.

    `base` replaces the place where the artifact says its base is. A merged model has no base to be compared with.
    Returns what `compare` does.
    """
    # The trained model is no longer needed: on a small card there is no room for two.
    gc.collect()
    torch.cuda.empty_cache()
    device = pick_device()
    loaded, usage = load_model(
        artifact, device=device, dtype=pick_dtype(precision, device), base=base, template=template
    )
    return compare(
        loaded,
        records,
        template=template_to_ask(usage, artifact),
        aspect_ratio=usage.image_aspect_ratio,
        max_new_tokens=max_new_tokens,
        max_rows=max_rows,
        blind_questions=blind_questions,
        directory=directory,
        console=console,
        base=compare_base and isinstance(loaded.model, PeftModel),
    )


def print_outcome(recipe: Recipe, console: Console) -> None:
    """Say where the results of a run are."""
    directory = recipe.resolved_output_dir
    if (skipped := directory / output.SKIPPED).exists():
        count = len(skipped.read_text(encoding="utf-8").splitlines())
        console.print(
            f"\n{count:,} bad records were skipped; {output.SKIPPED} says which and why.", style="bold yellow"
        )
    places = [*recipe.stage_names, output.SUMMARY, output.LOSS_PLOT, f"{output.EVALUATION}/{SAMPLES}", output.SKIPPED]
    console.print(f"\nIn {shown_path(directory)}:")
    for name in places:
        if (directory / name).exists():
            console.print(f"  {name}")
