"""The command that publishes a model: push."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from lora_llava.cli.common import make_console, print_lines, quiet_libraries
from lora_llava.cli.options import PATH
from lora_llava.system.text import printable_lines

if TYPE_CHECKING:
    from rich.console import Console

    from lora_llava.shipping.hub.prepare import Prepared


class _Options(TypedDict):
    """Options of `push` that say where to push."""

    revision: str | None
    create_pr: bool


def _note_former(_: click.Context, __: click.Parameter, given: bool) -> None:
    """Say that the former option `--no-samples` has become the default."""
    if given:
        click.echo("note: --no-samples is the default now, and is not needed; --samples uploads samples.png", err=True)


@click.command()
@click.argument("model", metavar="ARTIFACT_OR_MODEL", type=PATH)
@click.argument("repo_id")
@click.option("--private/--public", "private", default=True, show_default=True, help="Visibility of a new repository.")
@click.option("--run", type=PATH, help="Directory of the run, for results and plots [that of the artifact].")
@click.option("--samples", is_flag=True, help="Upload samples.png too, which shows test images [no].")
@click.option("--no-samples", is_flag=True, hidden=True, expose_value=False, is_eager=True, callback=_note_former)
@click.option("--revision", metavar="BRANCH", help="Branch to commit to; created if missing [the main one].")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--dry-run", is_flag=True, help="Show the files and the card; upload nothing.")
def push(
    model: Path,
    repo_id: str,
    private: bool,
    run: Path | None,
    samples: bool,
    dry_run: bool,
    **options: Unpack[_Options],
) -> None:
    """Publish on the Hugging Face Hub.

    Uploads an artifact or a model to REPO_ID (NAMESPACE/NAME) in one commit, with a model card generated from the run
    unless there is a README.md next to the weights. Pushing again uploads only what changed. Images of your data stay
    here unless you give --samples.
    """
    # Import before quiet_libraries, so that long uploads keep their progress bars on a terminal.
    import huggingface_hub.hf_api  # noqa: F401 - brings tqdm

    quiet_libraries()
    from lora_llava.shipping.hub.prepare import prepare
    from lora_llava.shipping.hub.push import Target, full_name
    from lora_llava.shipping.hub.push import push as push_prepared

    console = make_console()
    if console.is_terminal:
        from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]  # their way to export

        enable_progress_bars()
    prepared = prepare(model, repo_id if dry_run else full_name(repo_id), run=run, samples=samples)
    _show_files(prepared, console)
    if dry_run:
        origin = "your README.md" if prepared.own_card else "generated"
        console.print(f"\nDry run: nothing was uploaded. The card ({origin}):\n")
        # Not escaped in a pipe, so that a file holds the card itself.
        click.echo(printable_lines(prepared.card) if sys.stdout.isatty() else prepared.card)
        return
    print_lines(push_prepared(prepared, Target(public=not private, **options)), console)


def _show_files(prepared: Prepared, console: Console) -> None:
    """Print which files are uploaded and which are not, and which of them show data."""
    from rich.table import Table

    table = Table(title=f"To {prepared.repo_id}", title_justify="left")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    table.add_column("")
    for file in prepared.files:
        notes = ["local paths removed"] if file.changed else []
        notes += ["shows images and texts of the test data"] if file.shows_data else []
        table.add_row(file.name, f"{file.size:,}", ", ".join(notes))
    console.print(table)
    lines = [f"not uploaded: {', '.join(prepared.left_out)}"] if prepared.left_out else []
    if prepared.withheld:
        names = ", ".join(prepared.withheld)
        lines.append(
            f"not uploaded, because it shows images and texts of the test data: {names} (--samples uploads it)"
        )
    if "/" not in prepared.repo_id:
        lines.append(f"the card will say NAMESPACE/{prepared.repo_id}, with the namespace of your token")
    if prepared.needs_local_base:
        lines.append("the base model is a local directory, which others need too; or merge first and push the result")
    print_lines(lines, console)
