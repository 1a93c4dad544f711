"""The directory of a run: claimed before the first step, never emptied of what the kit did not write."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lora_llava.data.bad_records import BadRecord
from lora_llava.errors import TrainingError
from lora_llava.files import clear_leftovers, shown_path, write_text
from lora_llava.recipe import Recipe
from lora_llava.recipe_file import dump_resolved

RECIPE = "recipe.yaml"
TRAIN_LOG = "train_log.jsonl"
LOSS_PLOT = "loss.png"
SUMMARY = "summary.json"
SKIPPED = "skipped.jsonl"
BASE = "base"
EVALUATION = "evaluation"
CHECKPOINTS = "checkpoints"
"""Below it a directory for each stage."""
FEATURES = "features"
"""Cached image features; named by what they depend on, so that they outlive the run that made them."""
STAGES = ("align", "instruct")

_FILES = (RECIPE, TRAIN_LOG, LOSS_PLOT, SUMMARY, SKIPPED)
_DIRECTORIES = (BASE, EVALUATION, CHECKPOINTS, *STAGES)


def claim_output_dir(directory: Path, *, overwrite: bool) -> None:
    """Create the run's directory, or clear the traces of an earlier run from it if `overwrite`.

    Raises TrainingError if it holds a run and `overwrite` is false, or if it cannot be written. Files that no
    run writes stay where they are.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"output_dir {directory} cannot be made: {error.strerror}") from error
    known = [directory / name for name in (*_FILES, *_DIRECTORIES)]
    found = [path for path in known if path.exists()]
    if found and not overwrite:
        raise TrainingError(
            f"output_dir {directory} holds a run already ({', '.join(path.name for path in found)}). --resume goes on "
            "with it, --overwrite replaces it; or give another with output_dir=PATH."
        )
    clear_leftovers(directory)
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    _check_writable(directory)


def reopen_output_dir(directory: Path) -> dict[str, Any]:
    """Take up the run in `directory` again and return its summary as far as it goes.

    Raises TrainingError if there is no run, or if it cannot be written.
    """
    if not (directory / RECIPE).is_file():
        raise TrainingError(
            f"--resume: there is nothing to resume in output_dir {directory}: it holds no {RECIPE} of a run. Leave "
            "--resume out to start one, or give the right directory with output_dir=PATH."
        )
    _check_writable(directory)
    clear_leftovers(directory)
    return read_summary(directory)


def _check_writable(directory: Path) -> None:
    try:
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise TrainingError(f"output_dir {directory} cannot be written: {error.strerror}") from error


def write_recipe(directory: Path, recipe: Recipe) -> None:
    """Write the recipe of a run, every default written out."""
    with writing_named(RECIPE, directory):
        write_text(directory / RECIPE, dump_resolved(recipe, directory))


def read_summary(directory: Path) -> dict[str, Any]:
    """Read the run's summary, {} if there is none yet."""
    path = directory / SUMMARY
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise TrainingError(f"{path} is damaged ({error}); remove it to go on without what it says") from error
    return content


def write_summary(directory: Path, summary: dict[str, Any]) -> None:
    """Write the run's summary."""
    with writing_named(SUMMARY, directory):
        write_text(directory / SUMMARY, json.dumps(summary, indent=2) + "\n")


def read_log(directory: Path) -> list[dict[str, Any]]:
    """Read the run's log."""
    path = directory / TRAIN_LOG
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def cut_log(directory: Path, size: int) -> None:
    """Cut away what the log says beyond `size` bytes: of steps that are trained again."""
    path = directory / TRAIN_LOG
    if path.exists() and path.stat().st_size > size:
        os.truncate(path, size)


def drop_from_log(directory: Path, stage: str) -> None:
    """Cut away what the log says from `stage` on, which starts again, and a line that was not written to its end."""
    path = directory / TRAIN_LOG
    size = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        if not line.endswith(b"\n") or json.loads(line)["stage"] == stage:
            break
        size += len(line)
    cut_log(directory, size)


def resume_command(directory: Path) -> str:
    """Return the command that goes on with a run."""
    return f"lora-llava finetune {shown_path(directory / RECIPE)} --resume"


@contextmanager
def writing_named(what: str, directory: Path) -> Iterator[None]:
    """Turn an error of writing `what` of the run in `directory` into a TrainingError that says what to do."""
    try:
        yield
    except Exception as error:
        # The Rust libraries below safetensors and tokenizers have errors of their own.
        if not isinstance(error, (OSError, SafetensorError)) and "(os error " not in str(error):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        free = shutil.disk_usage(directory).free / 2**20
        raise TrainingError(
            f"{what} could not be written to {shown_path(directory)}: {reason} ({free:,.0f} MiB are free there). "
            "Earlier checkpoints are whole. Make room, or make the directory writable; then go on with: "
            f"{resume_command(directory)}"
        ) from error


def note_skipped(directory: Path, part: str, skipped: Sequence[BadRecord]) -> None:
    """Note the records that a part of the run (a stage, or the evaluation) left out in the run's list of them."""
    path = directory / SKIPPED
    kept = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    # A part that is done again says it again.
    kept = [line for line in kept if line.endswith("\n") and json.loads(line)["part"] != part]
    kept += [json.dumps({"part": part, **asdict(record)}) + "\n" for record in skipped]
    if kept:
        with writing_named(SKIPPED, directory):
            write_text(path, "".join(kept))
