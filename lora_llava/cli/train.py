"""Commands that train: finetune, quickstart, recipes."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_llava.cli.common import (
    ARGUMENTS,
    leave_torch_out,
    loading_console,
    look_ahead,
    make_console,
    memory_size,
    open_recipe,
    quiet_libraries,
)
from lora_llava.errors import RecipeError
from lora_llava.system import ranks
from lora_llava.system.files import disk_errors, new_file
from lora_llava.system.names import did_you_mean, similar
from lora_llava.system.progress import phase
from lora_llava.system.text import printable

if TYPE_CHECKING:
    from rich.console import Console

    from lora_llava.planning.preflight.setup import Start
    from lora_llava.recipe.settings import Recipe
    from lora_llava.training.checkpoints.differences import Resume


_GPUS = "gpus"
"""Key of the command's context: the number of processes to start; None if it is not given."""


def _note_gpus(context: click.Context, _: click.Parameter, gpus: int | None) -> None:
    context.meta[_GPUS] = gpus


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Show the plan, parameters and memory; train and write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in output_dir.")
@click.option("--resume", "resume", flag_value="exact", help="Resume the run in output_dir exactly.")
@click.option(
    "--resume-anyway",
    "resume",
    flag_value="anyway",
    help="Resume although settings or data changed; lists the guarantees lost.",
)
@click.option(
    "--memory",
    type=memory_size,
    metavar="SIZE",
    help="Plan for a GPU with this much memory, such as 12GiB, and stay within it [free memory].",
)
@click.option("--skip-image-check", is_flag=True, help="Do not open every image before training.")
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    metavar="N",
    expose_value=False,
    callback=_note_gpus,
    help="Train on N GPUs of this machine, in a process for each; with --dry-run, plan for them [1].",
)
def finetune(
    recipe: str,
    overrides: tuple[str, ...],
    dry_run: bool,
    overwrite: bool,
    resume: Resume | None,
    memory: int | None,
    skip_image_check: bool,
) -> None:
    """Train the stages of a recipe.

    RECIPE is a YAML file. KEY=VALUE overrides a setting, such as stages.instruct.max_steps=20. If the recipe has an
    evaluation, the result is then compared with its base model.
    """
    if overwrite and resume:
        raise click.UsageError("--overwrite starts over and --resume continues: give only one of them")
    gpus = click.get_current_context().meta.get(_GPUS)
    if gpus is not None and not dry_run:
        _start_processes(gpus)
    with ranks.planned_for(gpus) if dry_run and gpus is not None and gpus > 1 else ranks.connected():
        settings = open_recipe(recipe, overrides)
        console = make_console()
        console.print(f"Recipe {settings.name}: {', then '.join(settings.stage_names)}.")
        if dry_run:
            leave_torch_out(settings)
        start: Start = "overwrite" if overwrite else "resume" if resume else "new"
        here = not dry_run or memory is None
        ranks.by_first(lambda: look_ahead(settings, recipe, console, start=start, here=here, data=not skip_image_check))
        if not dry_run:
            phase("Loading PyTorch and transformers")
        quiet_libraries()
        if dry_run:
            ranks.by_first(lambda: _print_dry_run(settings, console, memory))
            return
        from lora_llava.training.run import print_next, print_outcome, run_recipe

        run_recipe(settings, console, overwrite=overwrite, memory=memory, resume=resume or "no")
        print_outcome(settings, console)
        print_next(settings, console)


def _start_processes(gpus: int) -> None:
    """Run the command in a process for each card, and exit as they do; return in each of these, or for one card."""
    if gpus > 1 and ranks.world_size() == 1:
        from lora_llava.system.launch import run_on_cards

        context = click.get_current_context()
        context.exit(run_on_cards(gpus, context.meta[ARGUMENTS]))
    if gpus != ranks.local_world_size():
        raise click.UsageError(f"--gpus {gpus}: {ranks.world_size()} processes were started already; leave it out")


def _print_dry_run(settings: Recipe, console: Console, memory: int | None) -> None:
    from lora_llava.data.questions import load_questions
    from lora_llava.planning.dry_run import print_dry_run

    # Load the questions as a run does, to reject a key of `by` that no record has.
    if settings.evaluation is not None:
        load_questions(settings.evaluation.data, settings.evaluation.broken_down_by)
    print_dry_run(settings, console, memory)


@click.command()
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("quickstart"),
    show_default=True,
    help="Directory for everything; delete it to undo everything.",
)
def quickstart(directory: Path) -> None:
    """Train and evaluate a small model on a CPU.

    Downloads SmolLM2-135M and easy-VQA (93 MiB) with pip, trains both stages, and compares the result with its base.
    A second run starts over but downloads nothing again.
    """
    from lora_llava.planning.preflight.environment import refuse_several_processes

    refuse_several_processes()
    console = loading_console()
    from lora_llava.quickstart.run import run_quickstart

    run_quickstart(directory, console)


@click.group()
def recipes() -> None:
    """List or copy the bundled recipes."""


@recipes.command("list")
def _list_recipes() -> None:
    """List the bundled recipes, each with the first line of its header."""
    from lora_llava.recipe.file import bundled_recipes

    bundled = bundled_recipes()
    width = max(len(name) for name in bundled)
    for name, path in sorted(bundled.items()):
        click.echo(f"{name:<{width}}  {_header(path)}".rstrip())


def _header(path: Path) -> str:
    """Return the first comment line of a recipe."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and (text := line.strip("# ")):
            return text
    return ""


@recipes.command("copy")
@click.argument("name")
@click.option("--to", "target", type=click.Path(path_type=Path), help="File or directory to copy to [./NAME.yaml].")
def _copy_recipe(name: str, target: Path | None) -> None:
    """Copy a bundled recipe, to edit and run; never overwrites a file."""
    from lora_llava.recipe.file import bundled_recipes

    bundled = bundled_recipes()
    source = bundled.get(name.removesuffix(".yaml"))
    if source is None:
        there = f"The bundled ones are {', '.join(sorted(bundled))}."
        hint = did_you_mean(similar(name.removesuffix(".yaml"), bundled), there)
        raise RecipeError(f"there is no recipe {name}. {hint}")
    target = target or Path(source.name)
    if os.path.lexists(target) and target.is_dir():
        target /= source.name
    with disk_errors(target, "Nothing was written"), new_file(target) as file:
        shutil.copyfile(source, file)
    click.echo(printable(f"copied to {target}; run it with: lora-llava finetune {shlex.quote(str(target))}"))
