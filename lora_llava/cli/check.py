"""The command that checks data before a run: check."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_llava.cli.common import leave_torch_out, look_ahead, make_console, open_recipe, print_lines, quiet_libraries
from lora_llava.errors import RecipeError
from lora_llava.system.files import refuse_existing, refuse_unwritable
from lora_llava.system.progress import phase

if TYPE_CHECKING:
    from lora_llava.planning.preflight.setup import Start
    from lora_llava.recipe.settings import Recipe

_DIRECTORY = "check"
"""Directory of the report, inside the run's directory."""


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory of the report [check/ in that of the run].",
)
@click.option("--workers", type=click.IntRange(min=1), help="Number of processes [one per core].")
@click.option(
    "--fix",
    type=click.Path(path_type=Path),
    help="New directory for the data without bad records, duplicates, first turns of the model and wrong extensions.",
)
@click.option("--overwrite", is_flag=True, help="Check for finetune --overwrite.")
@click.option("--resume", is_flag=True, help="Check for finetune --resume.")
def check(
    recipe: str,
    overrides: tuple[str, ...],
    output: Path | None,
    workers: int | None,
    fix: Path | None,
    overwrite: bool,
    resume: bool,
) -> None:
    """Check all data of a recipe and write a report.

    Reads every record, decodes every image, tokenizes every conversation, and compares training with test data. Loads
    only the tokenizer of the base model. The exit code is 1 if a run would fail.
    """
    if overwrite and resume:
        raise click.UsageError("--overwrite starts over and --resume continues: give only one of them")
    clock = time.monotonic()
    settings = open_recipe(recipe, overrides)
    directory = _report_directory(output, settings)
    if fix is not None:
        refuse_existing(fix)
    console = make_console()
    leave_torch_out(settings)
    start: Start = "overwrite" if overwrite else "resume" if resume else "new"
    look_ahead(settings, recipe, console, start=start, data=False)
    from lora_llava.doctor.survey import survey

    # Fork the processes before importing transformers makes this one large.
    phase("Reading the data")
    surveyed = survey(settings, workers)
    quiet_libraries()
    from lora_llava.doctor.conversations import encode_sides
    from lora_llava.doctor.page import write_page
    from lora_llava.doctor.report import make_report, write_report
    from lora_llava.doctor.terminal import print_report

    conversations = encode_sides(surveyed, workers)
    report = make_report(surveyed, conversations, time.monotonic() - clock)
    write_report(report, write_page(report), directory)
    print_report(report, click.format_filename(directory), console)
    if fix is not None:
        from lora_llava.doctor.fix import FIXES, RECIPE, write_fixed

        print_lines(write_fixed(report, fix), console)
        name = click.format_filename(fix)
        console.print(f"{name}/{RECIPE} reads the cleaned data, {name}/{FIXES} lists all changes.", soft_wrap=True)
    if report.count("error"):
        click.get_current_context().exit(1)


def _report_directory(output: Path | None, settings: Recipe) -> Path:
    """Return the directory of the report. Raises RecipeError or click.UsageError if it cannot be one."""
    if output is not None:
        refuse_unwritable(output, RecipeError)
    directory = output or settings.resolved_output_dir / _DIRECTORY
    if directory.exists() and not directory.is_dir():
        raise click.UsageError(f"{directory} is a file, and the report needs a directory; give another --output")
    return directory
