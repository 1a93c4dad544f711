"""Commands that prepare data: init, convert."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from lora_llava.cli.check import check
from lora_llava.cli.common import make_console, print_lines, quiet_environment
from lora_llava.cli.options import COLUMNS_EXAMPLE, PATH, encoding_option, parse_columns, settings_errors
from lora_llava.data.convert.run import KINDS, convert, summary
from lora_llava.errors import LoraLlavaError, RecipeError
from lora_llava.system.files import disk_errors, new_file, refuse_existing
from lora_llava.system.progress import phase
from lora_llava.system.text import counted, printable

_BASE = "llava-hf/llava-1.5-7b-hf"


@click.command()
@click.argument("data")
@click.option("--output", type=PATH, default=Path("recipe.yaml"), show_default=True, help="Recipe file to write.")
@click.option("--base-model", default=_BASE, show_default=True, help="Base model: directory or Hub id.")
@click.option(
    "--columns",
    callback=lambda _, __, text: parse_columns(text),
    help=f"Such as image=Bild,question=Frage,answer=Befund, or as in a recipe: {COLUMNS_EXAMPLE} [by their names].",
)
@encoding_option
@click.pass_context
def init(
    context: click.Context,
    data: str,
    output: Path,
    base_model: str,
    columns: dict[str, Any] | None,
    encoding: str | None,
) -> None:
    """Write a recipe for your data and check it.

    DATA is a file, a directory or the id of a data set on the Hub. The recipe has comments on every choice; edit it as
    you like.
    """
    refuse_existing(output, RecipeError)
    console = make_console()
    quiet_environment()
    phase("Looking at the data")
    from lora_llava.planning.proposal.look import look_at
    from lora_llava.planning.proposal.text import recipe_text

    with settings_errors():
        look = look_at(data, columns, encoding)
    text = recipe_text(look, output, base_model)
    with disk_errors(output, "Nothing was written"), new_file(output) as file:
        file.write_text(text, encoding="utf-8")
    about = f"{data}: {look.form}; {counted(len(look.records), 'record')}."
    for line in (about, *look.notes, f"Wrote {output}. Checking it:"):
        console.print(printable(line))
    name = shlex.quote(str(output))
    try:
        context.invoke(
            check, recipe=str(output), overrides=(), output=None, workers=None, overwrite=False, resume=False
        )
    except LoraLlavaError as error:
        error.args = (f"{error}\n{output} is written, but not checked. Correct it, then: lora-llava check {name}",)
        raise
    console.print(printable(f"Next: lora-llava finetune {name} --dry-run"), soft_wrap=True)


@click.command("convert")
@click.argument("kind", type=click.Choice(list(KINDS)), metavar="KIND")
@click.argument("source", type=PATH, metavar="SRC")
@click.argument("output", type=PATH, metavar="DST")
@click.option("--images", type=PATH, help="Directory of the images [that of the annotations].")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of what is drawn.")
@click.option(
    "--per-image",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Maximum questions of a kind about one image.",
)
@click.option("--question", help="Question for answers that come without one.")
@click.option("--table", type=PATH, help="dicom: file of the reports or questions.")
@encoding_option
@click.option("--window", type=float, nargs=2, help="dicom: values shown as black and white [as the file says].")
def convert_(
    kind: str,
    source: Path,
    output: Path,
    window: tuple[float, float] | None,
    **options: object,
) -> None:
    """Convert a data set to LLaVA's JSON Lines.

    KIND is the form of SRC: {kinds}. DST, which must not exist, gets the records, their images and a report of what was
    left out and why.
    """
    refuse_existing(output)
    if window is not None and window[0] >= window[1]:
        raise click.BadParameter("the first value, shown as black, must be the lower one", param_hint="--window")
    console = make_console()
    phase("Converting the data")
    from lora_llava.data.convert.writer import ConvertOptions

    with settings_errors():
        report = convert(kind, source, output, ConvertOptions(window=window, **options))  # type: ignore[arg-type]
    print_lines(summary(report, output), console)


convert_.help = (convert_.help or "").replace("{kinds}", ", ".join(KINDS))
