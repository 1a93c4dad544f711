"""The directory of a run: claimed before the first step, never emptied of what the kit did not write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lora_llava.data.bad_records import BadRecord
from lora_llava.errors import TrainingError

RECIPE = "recipe.yaml"
TRAIN_LOG = "train_log.jsonl"
LOSS_PLOT = "loss.png"
SUMMARY = "summary.json"
SKIPPED = "skipped.jsonl"
BASE = "base"
EVALUATION = "evaluation"
FEATURES = "features"
"""Cached image features; named by what they depend on, so that they outlive the run that made them."""
STAGES = ("align", "instruct")

_FILES = (RECIPE, TRAIN_LOG, LOSS_PLOT, SUMMARY, SKIPPED)
_DIRECTORIES = (BASE, EVALUATION, *STAGES)


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
            f"output_dir {directory} holds a run already ({', '.join(path.name for path in found)}). Give another "
            "with output_dir=PATH, or --overwrite to replace it."
        )
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    try:
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise TrainingError(f"output_dir {directory} cannot be written: {error.strerror}") from error


def note_skipped(directory: Path, part: str, skipped: Sequence[BadRecord]) -> None:
    """Add the records that a part of the run (a stage, or the evaluation) left out to the run's list of them."""
    if skipped:
        with (directory / SKIPPED).open("a", encoding="utf-8") as handle:
            handle.writelines(json.dumps({"part": part, **asdict(record)}) + "\n" for record in skipped)
