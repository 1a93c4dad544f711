"""The command that publishes a model: push."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_llava.cli.common import make_console, quiet_libraries
from lora_llava.system.text import printable_lines

if TYPE_CHECKING:
    from rich.console import Console

    from lora_llava.shipping.hub.push import Prepared

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("model", metavar="ARTIFACT_OR_MODEL", type=_PATH)
@click.argument("repo_id")
@click.option("--private/--public", "private", default=True, show_default=True, help="Visibility of a new repository.")
@click.option("--run", type=_PATH, help="Directory of the run, for results and plots [that of the artifact].")
@click.option(
    "--samples/--no-samples", default=True, show_default=True, help="Upload samples.png, which shows test images."
)
@click.option("--dry-run", is_flag=True, help="Show the files and the card; upload nothing.")
def push(model: Path, repo_id: str, private: bool, run: Path | None, samples: bool, dry_run: bool) -> None:
    """Publish on the Hugging Face Hub.

    Uploads an artifact or a model to REPO_ID (NAMESPACE/NAME) in one commit, with a model card generated from the run
    unless there is a README.md next to the weights. Pushing again uploads only what changed.
    """
    # Import before quiet_libraries, so that long uploads keep their progress bars on a terminal.
    import huggingface_hub.hf_api  # noqa: F401 - brings tqdm

    quiet_libraries()
    from lora_llava.shipping.hub.push import prepare
    from lora_llava.shipping.hub.push import push as push_prepared

    console = make_console()
    if console.is_terminal:
        from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]  # their way to export

        enable_progress_bars()
    prepared = prepare(model, repo_id, run=run, samples=samples)
    _show_files(prepared, console)
    if dry_run:
        origin = "your README.md" if prepared.own_card else "generated"
        console.print(f"\nDry run: nothing was uploaded. The card ({origin}):\n")
        # Not escaped in a pipe, so that a file holds the card itself.
        click.echo(printable_lines(prepared.card) if sys.stdout.isatty() else prepared.card)
        return
    for line in push_prepared(prepared, public=not private):
        console.print(line, soft_wrap=True, markup=False)


def _show_files(prepared: Prepared, console: Console) -> None:
    """Print which files are uploaded and which are not."""
    from rich.table import Table

    table = Table(title=f"To {prepared.repo_id}", title_justify="left")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    table.add_column("")
    for file in prepared.files:
        table.add_row(file.name, f"{file.size:,}", "local paths removed" if file.changed else "")
    console.print(table)
    lines = [f"not uploaded: {', '.join(prepared.left_out)}"] if prepared.left_out else []
    if prepared.needs_local_base:
        lines.append("the base model is a local directory, which others need too; or merge first and push the result")
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
