"""Run the quickstart: download and prepare assets, train both stages on a CPU, compare with the base."""

from __future__ import annotations

import itertools
import os
import shlex
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_llava.quickstart.assets import prepare_assets
from lora_llava.recipe.file import bundled_recipes, load_recipe
from lora_llava.run_directory.lock import locked
from lora_llava.run_directory.output import write_summary
from lora_llava.system.files import shown_path, write_text
from lora_llava.training.run import print_outcome, run_recipe

RECIPE = "quickstart"
FULL_RECIPE = "easy_vqa"
_MEDICAL_RECIPE = "medical_vqa"


def run_quickstart(directory: Path, console: Console) -> dict[str, Any]:
    """Run the bundled quickstart recipe in `directory` from the start; reuse only the downloads.

    Returns the summary of the run. Raises subclasses of LoraLlavaError, such as TrainingError if another quickstart is
    at work in the directory: both would unpack over the files that the other reads.
    """
    directory = directory.resolve()
    with locked(directory, "--dir"):
        return _run_quickstart(directory, console)


def _run_quickstart(directory: Path, console: Console) -> dict[str, Any]:
    clock = time.monotonic()
    prepare_assets(directory, lambda line: console.print(line, soft_wrap=True, markup=False))
    for name in (RECIPE, FULL_RECIPE):
        place_recipe(bundled_recipes()[name], directory, console)
    seconds = round(time.monotonic() - clock, 1)
    recipe = load_recipe(directory / f"{RECIPE}.yaml")
    summary = run_recipe(recipe, console, overwrite=True)
    summary["seconds"] = {"prepare": seconds, **summary["seconds"]}
    write_summary(recipe.resolved_output_dir, summary)
    print_outcome(recipe, console)
    _print_next(directory, recipe.resolved_output_dir / recipe.stage_names[-1], console)
    return summary


def place_recipe(source: Path, directory: Path, console: Console) -> None:
    """Copy a recipe next to the data; rename an edited copy instead of overwriting it."""
    target, text = directory / source.name, source.read_text(encoding="utf-8")
    if target.is_file() and not target.is_symlink() and target.read_text(encoding="utf-8", errors="replace") == text:
        return
    if os.path.lexists(target):
        names = (target.with_name(f"{target.name}.old{number or ''}") for number in itertools.count())
        backup = next(path for path in names if not os.path.lexists(path))
        target.rename(backup)
        console.print(f"{target.name} was edited; your version is now {backup.name}")
    write_text(target, text)


def _print_next(directory: Path, artifact_directory: Path, console: Console) -> None:
    """Print commands to try next."""

    def path(name: str) -> str:
        return shlex.quote(shown_path(directory / name))

    artifact = shlex.quote(shown_path(artifact_directory))
    commands = {
        "ask it a question": f'chat {artifact} --image {path("data/images/test/0.png")} "what color is the shape?"',
        "see a training record": f"inspect {path(f'{RECIPE}.yaml')} --index 0",
        "evaluate it again": (
            f"eval {artifact} --data {path('data/test.json')} --image-root {path('data/images/test')} "
            f"--max-records 500 --output {path('evaluation')}"
        ),
        "train on all of easy-VQA": f"finetune {path(f'{FULL_RECIPE}.yaml')}",
        "train on medical images, on a GPU": f"recipes copy {_MEDICAL_RECIPE}",
    }
    console.print("\nNext:")
    for what, command in commands.items():
        console.print(f"  # {what}\n  lora-llava {command}", soft_wrap=True, markup=False)
