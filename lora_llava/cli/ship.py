"""Commands that bring what was trained to where it is used: merge, export, import."""

from __future__ import annotations

from pathlib import Path

import click

from lora_llava.cli.common import make_console, quiet_libraries
from lora_llava.export import FORMATS
from lora_llava.export.options import ExportOptions

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("model", type=_PATH)
@click.argument("output", type=_PATH)
@click.option("--format", "layout", type=click.Choice(list(FORMATS)), required=True, help="Layout to write.")
@click.option("--base-model", help="The base, if it is not where the artifact says: directory or hub id.")
@click.option("--vision-tower", help="llava: name the tower instead of including it.")
def export(model: Path, output: Path, layout: str, base_model: str | None, vision_tower: str | None) -> None:
    """Write MODEL, an artifact or a merged model, to OUTPUT in another layout.

    OUTPUT must not exist; it appears when it is complete and has been checked.
    """
    quiet_libraries()
    report = FORMATS[layout](model, output, ExportOptions(base_model=base_model, vision_tower=vision_tower))
    for line in report["summary"]:
        make_console().print(line, soft_wrap=True)
