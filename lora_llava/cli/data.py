"""Commands that prepare data: convert."""

from __future__ import annotations

from pathlib import Path

import click

from lora_llava.cli.common import make_console
from lora_llava.data.convert.run import KINDS, convert, summary
from lora_llava.system.files import refuse_existing
from lora_llava.system.progress import phase

_PATH = click.Path(path_type=Path)


@click.command("convert")
@click.argument("kind", type=click.Choice(list(KINDS)), metavar="KIND")
@click.argument("source", type=_PATH, metavar="SRC")
@click.argument("output", type=_PATH, metavar="DST")
@click.option("--images", type=_PATH, help="Directory of the images [that of the annotations].")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of what is drawn.")
@click.option(
    "--per-image",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Maximum questions of a kind about one image.",
)
@click.option("--question", help="Question for answers that come without one.")
@click.option("--table", type=_PATH, help="dicom: CSV file of the reports.")
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

    report = convert(kind, source, output, ConvertOptions(window=window, **options))  # type: ignore[arg-type]
    for line in summary(report, output):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


convert_.help = (convert_.help or "").replace("{kinds}", ", ".join(KINDS))
