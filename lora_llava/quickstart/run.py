"""From nothing to a tuned model on a CPU: fetch, prepare, train both stages, compare with the base."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_llava.quickstart.assets import prepare_assets
from lora_llava.recipe.file import bundled_recipes, load_recipe
from lora_llava.run_directory.output import write_summary
from lora_llava.system.files import shown_path, write_text
from lora_llava.training.run import finetune_and_evaluate, print_outcome

RECIPE = "quickstart"
FULL_RECIPE = "easy_vqa"
MEDICAL_RECIPE = "medical_vqa"


def run_quickstart(directory: Path, console: Console) -> dict[str, Any]:
    """Run the bundled quickstart recipe inside `directory`, from the start; only what is fetched is kept.

    Returns the run's summary. Raises LoraLlavaError's subclasses.
    """
    directory = directory.resolve()
    clock = time.monotonic()
    prepare_assets(directory, lambda line: console.print(line, soft_wrap=True, markup=False))
    for name in (RECIPE, FULL_RECIPE):
        place_recipe(bundled_recipes()[name], directory, console)
    seconds = round(time.monotonic() - clock, 1)
    recipe = load_recipe(directory / f"{RECIPE}.yaml")
    summary = finetune_and_evaluate(recipe, console, overwrite=True)
    summary["seconds"] = {"prepare": seconds, **summary["seconds"]}
    write_summary(recipe.resolved_output_dir, summary)
    print_outcome(recipe, console)
    print_next(directory, recipe.resolved_output_dir / recipe.stage_names[-1], console)
    return summary


def place_recipe(source: Path, directory: Path, console: Console) -> None:
    """Copy a recipe beside the data; one that was edited there is kept under another name."""
    target, text = directory / source.name, source.read_text(encoding="utf-8")
    if target.is_file() and not target.is_symlink() and target.read_text(encoding="utf-8", errors="replace") == text:
        return
    if os.path.lexists(target):
        names = (target.with_name(f"{target.name}.old{number or ''}") for number in itertools.count())
        kept = next(path for path in names if not os.path.lexists(path))
        target.rename(kept)
        console.print(f"{target.name} had been edited: it is now {kept.name}")
    write_text(target, text)


def print_next(directory: Path, artifact_directory: Path, console: Console) -> None:
    """Print the commands to try next."""
    here, artifact = shown_path(directory), shown_path(artifact_directory)
    commands = {
        "ask it something": f'chat {artifact} --image {here}/data/images/test/0.png "what color is the shape?"',
        "see what it was taught": f"inspect {here}/{RECIPE}.yaml --index 0",
        "test it again": (
            f"eval {artifact} --data {here}/data/test.json --image-root {here}/data/images/test "
            f"--max-records 500 --output {here}/evaluation"
        ),
        "train on all of easy-VQA": f"finetune {here}/{FULL_RECIPE}.yaml",
        "train on medical images, on a GPU": f"recipes copy {MEDICAL_RECIPE}",
    }
    console.print("\nNext:")
    for what, command in commands.items():
        console.print(f"  # {what}\n  lora-llava {command}", soft_wrap=True, markup=False)
