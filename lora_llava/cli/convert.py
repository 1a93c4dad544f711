"""Commands that bring what was trained to where it is used: merge, export, import."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_llava.cli.common import file_size, make_console, quiet_libraries, refuse_model, refuse_source
from lora_llava.cli.options import base_option, onto_option, template_option
from lora_llava.shipping.export import FORMATS
from lora_llava.shipping.export.options import ExportOptions
from lora_llava.shipping.importers.options import ImportOptions
from lora_llava.system.files import refuse_existing
from lora_llava.system.progress import phase

if TYPE_CHECKING:
    from rich.console import Console

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("artifact", type=_PATH)
@click.argument("output", type=_PATH)
@base_option
@onto_option
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Type to write [the base's].")
@click.option("--max-shard-size", type=file_size, default="5GB", show_default=True, help="Largest file, such as 2GB.")
def merge(
    artifact: Path, output: Path, base_model: str | None, onto: str | None, dtype: str | None, max_shard_size: int
) -> None:
    """Fold ARTIFACT, LoRA and projector, into its base.

    Writes a model that plain transformers loads to OUTPUT, asks it and base + adapter the same questions, and
    keeps it only if they agree.
    """
    refuse_existing(output)
    refuse_model(artifact, base_model)
    console = make_console()
    phase("Loading PyTorch and transformers")
    quiet_libraries()
    import torch

    from lora_llava.shipping.merge.run import merge_artifact, summary

    report = merge_artifact(
        artifact,
        output,
        base=onto,  # type: ignore[arg-type]  # click has checked it
        base_model=base_model,
        dtype=getattr(torch, dtype) if dtype else None,
        max_shard_bytes=max_shard_size,
    )
    show(summary(report, output), console)


def show(lines: list[str], console: Console) -> None:
    """Print the lines of a report."""
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


@click.command()
@click.argument("model", type=_PATH)
@click.argument("output", type=_PATH)
@click.option(
    "--format", "layout", type=click.Choice(list(FORMATS), case_sensitive=False), required=True, help="Layout to write."
)
@base_option
@onto_option
@template_option
@click.option("--vision-tower", help="llava: name the tower instead of including it.")
@click.option(
    "--outtype",
    type=click.Choice(["f32", "f16", "q8_0", "q4_0"]),
    help="gguf: how weights are stored [f16; of gguf-lora f32].",
)
def export(
    model: Path,
    output: Path,
    layout: str,
    base_model: str | None,
    onto: str | None,
    template: str | None,
    vision_tower: str | None,
    outtype: str | None,
) -> None:
    """Write an artifact or a merged model in another layout.

    OUTPUT must not exist; it appears when it is complete and has been checked.
    """
    refuse_existing(output)
    refuse_model(model, base_model)
    console = make_console()
    phase("Loading PyTorch and transformers")
    quiet_libraries()
    options = ExportOptions(
        base_model=base_model,
        base=onto,  # type: ignore[arg-type]  # click has checked it
        template=template,
        vision_tower=vision_tower,
        outtype=outtype,
    )
    report = FORMATS[layout](model, output, options)
    show(report["summary"], console)


@click.command("import")
@click.argument("source", type=_PATH)
@click.argument("output", type=_PATH)
@partial(base_option, about="What an adapter was trained on: a LLaVA in the llava-hf layout, directory or hub id.")
@click.option("--vision-tower", help="The tower of an original checkpoint, if not what its config names.")
@template_option
def import_(source: Path, output: Path, base_model: str | None, vision_tower: str | None, template: str | None) -> None:
    """Bring in SOURCE, made by another tool.

    An original LLaVA-1.5 checkpoint becomes a model in the llava-hf layout; an original LoRA, mm_projector.bin or
    a PEFT adapter becomes an artifact. Pickled files are read for tensors alone.
    """
    refuse_existing(output)
    refuse_source(source, base_model)
    console = make_console()
    phase("Loading PyTorch and transformers")
    quiet_libraries()
    from lora_llava.shipping.importers import import_any

    show(import_any(source, output, ImportOptions(base_model, vision_tower, template)), console)
