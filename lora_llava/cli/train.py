"""Commands that train: finetune, quickstart, and the recipes they run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_llava.cli.common import leave_torch_out, look_ahead, make_console, memory_size, open_recipe, quiet_libraries
from lora_llava.errors import RecipeError
from lora_llava.system.progress import phase
from lora_llava.system.text import printable

if TYPE_CHECKING:
    from lora_llava.planning.preflight.setup import Start


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Show the plan, the parameters and the memory; train and write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in output_dir.")
@click.option("--resume", is_flag=True, help="Go on with the run in output_dir as if it had not been stopped.")
@click.option("--resume-anyway", is_flag=True, help="Go on though settings or data changed; says what is given up.")
@click.option("--memory", type=memory_size, metavar="SIZE", help="Plan for a card of, say, 12GiB [what is free].")
@click.option("--skip-image-check", is_flag=True, help="Do not open all images before the first step.")
def finetune(
    recipe: str,
    overrides: tuple[str, ...],
    dry_run: bool,
    overwrite: bool,
    resume: bool,
    resume_anyway: bool,
    memory: int | None,
    skip_image_check: bool,
) -> None:
    """Train the stages of RECIPE, a YAML file.

    KEY=VALUE replaces a setting, such as stages.instruct.max_steps=20.
    If the recipe has an evaluation, the result is then compared with its base.
    """
    if overwrite and (resume or resume_anyway):
        raise click.UsageError("--overwrite starts over and --resume goes on: give one of them")
    settings = open_recipe(recipe, overrides)
    console = make_console()
    console.print(f"Recipe {settings.name}: {', then '.join(settings.stage_names)}.")
    if dry_run:
        leave_torch_out(settings)
    start: Start = "overwrite" if overwrite else "resume" if resume or resume_anyway else "new"
    here = not dry_run or memory is None
    look_ahead(settings, recipe, console, start=start, here=here, data=not skip_image_check)
    if not dry_run:
        phase("Loading PyTorch and transformers")
    quiet_libraries()
    if dry_run:
        from lora_llava.evaluation.questions import load_questions
        from lora_llava.planning.dry_run import print_dry_run

        # As the run does before its first step: a key of `by` that no record has is refused.
        if settings.evaluation is not None:
            load_questions(settings.evaluation.data, settings.evaluation.by)
        print_dry_run(settings, console, memory)
        return
    from lora_llava.training.checkpoints.differences import Resume
    from lora_llava.training.run import finetune_and_evaluate, print_outcome

    mode: Resume = "anyway" if resume_anyway else "exact" if resume else "no"
    finetune_and_evaluate(settings, console, overwrite=overwrite, memory=memory, resume=mode)
    print_outcome(settings, console)


@click.command()
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("quickstart"),
    show_default=True,
    help="Where everything goes; deleting it undoes everything.",
)
def quickstart(directory: Path) -> None:
    """Train a small model on a CPU, from nothing to a score.

    Fetches SmolLM2-135M and easy-VQA (93 MiB) with pip, trains both stages, and compares with the base. Run
    again, it starts over, and fetches nothing twice.
    """
    from lora_llava.planning.preflight.environment import refuse_several_processes

    refuse_several_processes()
    console = make_console()
    phase("Loading PyTorch and transformers")
    quiet_libraries()
    from lora_llava.quickstart.run import run_quickstart

    run_quickstart(directory, console)


@click.group()
def recipes() -> None:
    """List or copy the recipes of the kit."""


@recipes.command("list")
def list_recipes() -> None:
    """List the names of the recipes, each with the first line of its header."""
    from lora_llava.recipe.file import bundled_recipes

    found = bundled_recipes()
    width = max(len(name) for name in found)
    for name, path in sorted(found.items()):
        click.echo(f"{name:<{width}}  {header(path)}".rstrip())


def header(path: Path) -> str:
    """Return the first comment line of a recipe."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and (text := line.strip("# ")):
            return text
    return ""


@recipes.command("copy")
@click.argument("name")
@click.option("--to", "target", type=click.Path(path_type=Path), help="File or directory to copy to [NAME.yaml here].")
def copy_recipe(name: str, target: Path | None) -> None:
    """Copy recipe NAME, to be edited and run; an existing file is never overwritten."""
    from lora_llava.recipe.file import bundled_recipes

    found = bundled_recipes()
    source = found.get(name.removesuffix(".yaml"))
    if source is None:
        raise RecipeError(f"there is no recipe {name}; the kit's own are {', '.join(sorted(found))}")
    target = target or Path(source.name)
    if target.is_dir():
        target /= source.name
    if target.exists() or target.is_symlink():
        raise RecipeError(f"{target} exists already and is not overwritten; give another file with --to")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    click.echo(printable(f"copied to {target}; run it with: lora-llava finetune {target}"))
