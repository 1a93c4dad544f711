"""The files of a run: their names, the summary, the log, and the list of skipped records."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lora_llava.data.bad_records import BadRecord
from lora_llava.errors import TrainingError
from lora_llava.recipe.file import dump_resolved, read_recipe
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.stages import STAGES
from lora_llava.run_directory.written import NEW, STATE, current, is_pending, note_all
from lora_llava.system.files import json_text, read_json, shown_path, staged_file

RECIPE = "recipe.yaml"
TRAIN_LOG = "train_log.jsonl"
LOSS_PLOT = "loss.png"
SUMMARY = "summary.json"
SKIPPED = "skipped.jsonl"
REFERENCE = "reference.safetensors"
"""Log-probabilities of the pairs of stage `prefer` by the weights it starts from."""
BASE = "base"
EVALUATION = "evaluation"
CHECKPOINTS = "checkpoints"
"""Holds one directory per stage."""
FEATURES = "features"
"""Cached image features, named by what they depend on, so that a later run can use them too."""

FILES = (RECIPE, TRAIN_LOG, LOSS_PLOT, SUMMARY, SKIPPED, REFERENCE)
DIRECTORIES = (BASE, EVALUATION, *STAGES, *(f"{CHECKPOINTS}/{stage}" for stage in STAGES))
"""Everything that a run writes, apart from `FEATURES`."""


@contextmanager
def writing(directory: Path, name: str) -> Iterator[Path]:
    """Yield a temporary path for the run's file `name`; list and rename the file if the block succeeds.

    Raises TrainingError if it cannot be written, or if a link or a directory has its name.
    """
    with writing_named(name, directory):
        path = current(directory) / name
        if path.is_symlink() or path.is_dir():
            raise TrainingError(f"{shown_path(path)} is a link or a directory, to which no run writes; move it")
        with staged_file(path) as temporary:
            yield temporary
            if temporary.exists():
                note_all(directory, {name: temporary})


def _write(directory: Path, name: str, text: str) -> None:
    with writing(directory, name) as path:
        path.write_text(text, encoding="utf-8")


def write_recipe(directory: Path, recipe: Recipe) -> None:
    """Write the recipe of a run with every default filled in."""
    _write(directory, RECIPE, dump_resolved(recipe, directory))


def write_card(directory: Path, stage: str, recipe: Recipe) -> None:
    """Update the `card` section in the recipe of a finished stage; leave its other settings alone."""
    stored = read_recipe(directory / stage / RECIPE)
    if stored.card != recipe.card:
        stored = stored.model_copy(update={"card": recipe.card})
        _write(directory, f"{stage}/{RECIPE}", dump_resolved(stored, directory / stage))


def read_summary(directory: Path) -> dict[str, Any]:
    """Read the run's summary; {} if there is none yet. Raises TrainingError if it is damaged."""
    return read_json(current(directory) / SUMMARY, TrainingError, "remove it to continue without what it says")


def write_summary(directory: Path, summary: dict[str, Any]) -> None:
    """Write the run's summary."""
    _write(directory, SUMMARY, json_text(summary, indent=2) + "\n")


def log_path(directory: Path) -> Path:
    """Return the current path of the run's log."""
    return current(directory) / TRAIN_LOG


def read_log(directory: Path) -> list[dict[str, Any]]:
    """Read the run's log; [] if there is none."""
    path = log_path(directory)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def append_to_log(directory: Path, row: Mapping[str, Any]) -> None:
    """Append one line to the run's log."""
    with writing_named("the log", directory):
        handle = os.open(log_path(directory), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json_text(row, ensure_ascii=False) + "\n")


def cut_log(directory: Path, size: int) -> None:
    """Truncate the log to `size` bytes, dropping steps that are trained again."""
    path = log_path(directory)
    if path.exists() and path.stat().st_size > size:
        os.truncate(path, size)


def drop_from_log(directory: Path, stage: str) -> None:
    """Truncate the log to the lines before `stage`, which starts again; drop a last line that is incomplete."""
    path = log_path(directory)
    size = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        if not line.endswith(b"\n") or json.loads(line)["stage"] == stage:
            break
        size += len(line)
    cut_log(directory, size)


def final_path(directory: Path, path: Path) -> Path:
    """Return the path that a file of the run will have after the first checkpoint."""
    new = directory / STATE / NEW
    return directory / path.relative_to(new) if path.is_relative_to(new) else path


def present_path(directory: Path, path: Path) -> Path:
    """Return the path that a file of the run has now, before or after the first checkpoint."""
    return path if is_pending(directory) else final_path(directory, path)


def resume_command(directory: Path) -> str:
    """Return the command that resumes a run."""
    return f"lora-llava finetune {shlex.quote(shown_path(directory / RECIPE))} --resume"


@contextmanager
def writing_named(what: str, directory: Path) -> Iterator[None]:
    """Turn an error of writing `what` of the run in `directory` into a TrainingError that says what to do."""
    try:
        yield
    except Exception as error:
        # safetensors and tokenizers, which are written in Rust, raise their own types.
        if not isinstance(error, (OSError, SafetensorError)) and "(os error " not in str(error):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        free = shutil.disk_usage(directory).free / 2**20
        advice = "Earlier checkpoints are intact. Free some space, or make the directory writable; then resume with: "
        advice += resume_command(directory)
        if is_pending(directory):
            advice = "What the directory held before is untouched. Free some space, or make it writable; run it again"
        raise TrainingError(
            f"{what} could not be written to {shown_path(directory)}: {reason} ({free:,.0f} MiB are free there). "
            f"{advice}"
        ) from error


def note_skipped(directory: Path, part: str, skipped: Sequence[BadRecord]) -> None:
    """Add the records that a part of the run (a stage, or the evaluation) skipped to the run's list of them."""
    path = current(directory) / SKIPPED
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    # A part that runs again replaces its own lines.
    lines = [line for line in lines if line.endswith("\n") and json.loads(line)["part"] != part]
    lines += [json.dumps({"part": part, **asdict(record)}) + "\n" for record in skipped]
    if lines:
        _write(directory, SKIPPED, "".join(lines))
