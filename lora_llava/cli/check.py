"""The command that looks at data before a run does: check."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_llava.cli.common import leave_torch_out, look_ahead, make_console, open_recipe, quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console

    from lora_llava.data.parallel import Advance

DIRECTORY = "check"
"""Where the report lies, below the run's directory."""


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), help="Directory [check/ of the run].")
@click.option("--workers", type=click.IntRange(min=1), help="Processes [one a core].")
def check(recipe: str, overrides: tuple[str, ...], output: Path | None, workers: int | None) -> None:
    """Open all data of RECIPE and report what is wrong with it.

    Reads every record, decodes every image, encodes every conversation, and compares the sides of each split. Of
    the base only the tokenizer is read. Ends with 1 if a run would fail.
    """
    clock = time.monotonic()
    settings = open_recipe(recipe, overrides)
    console = make_console()
    look_ahead(settings, recipe, console)
    from lora_llava.doctor.survey import survey

    # First, so that the processes are forked before torch makes this one large.
    with counter(console, "images") as advance:
        found = survey(settings, workers, advance)
    leave_torch_out(settings)
    quiet_libraries()
    from lora_llava.doctor.conversations import encode_sides
    from lora_llava.doctor.page import write_page
    from lora_llava.doctor.report import make_report, write_report
    from lora_llava.doctor.terminal import print_report

    with counter(console, "conversations") as advance:
        conversations = encode_sides(found, workers, advance)
    report = make_report(found, conversations, time.monotonic() - clock)
    directory = output or settings.resolved_output_dir / DIRECTORY
    write_report(report, write_page(report), directory)
    print_report(report, click.format_filename(directory), console)
    if report.count("error"):
        click.get_current_context().exit(1)


@contextmanager
def counter(console: Console, what: str) -> Iterator[Advance]:
    """Show how many are done, on a terminal; no thread draws it, since processes are forked meanwhile."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn(f"{what}: {{task.completed:,.0f}}"), TimeElapsedColumn())
    with Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)

        def advance(count: int) -> None:
            progress.update(task, advance=count, refresh=True)

        yield advance
