"""Commands that convert models: merge, export, import."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from lora_llava.cli.common import file_size, loading_console, open_model, print_lines
from lora_llava.cli.options import PATH, base_option, onto_option, template_option
from lora_llava.shipping.export import FORMATS, check_export
from lora_llava.shipping.export import export as export_model
from lora_llava.shipping.export.options import ExportOptions
from lora_llava.shipping.importers.options import ImportOptions
from lora_llava.system.files import refuse_existing


@click.command()
@click.argument("artifact", type=PATH)
@click.argument("output", type=PATH)
@base_option
@onto_option
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Data type of the weights [that of the base].",
)
@click.option(
    "--max-shard-size", type=file_size, default="5GB", show_default=True, help="Maximum size of a file, such as 2GB."
)
def merge(
    artifact: Path, output: Path, base_model: str | None, onto: str | None, dtype: str | None, max_shard_size: int
) -> None:
    """Merge an artifact into its base model.

    Writes a model that transformers loads without PEFT to OUTPUT, after checking that it agrees with the base and
    adapter.
    """
    refuse_existing(output)
    artifact = open_model(artifact, base_model, output if dtype is None else None)
    from lora_llava.run_directory.claim import require_artifact

    require_artifact(artifact)
    console = loading_console()
    import torch

    from lora_llava.shipping.merge.run import merge_artifact, summary

    report = merge_artifact(
        artifact,
        output,
        base=onto,  # type: ignore[arg-type]  # checked by click
        base_model=base_model,
        dtype=getattr(torch, dtype) if dtype else None,
        max_shard_bytes=max_shard_size,
    )
    print_lines(summary(report, output), console)


@click.command()
@click.argument("model", type=PATH)
@click.argument("output", type=PATH)
@click.option(
    "--format", "layout", type=click.Choice(list(FORMATS), case_sensitive=False), required=True, help="Format to write."
)
@base_option
@onto_option
@template_option
@click.option("--vision-tower", help="llava: refer to this vision tower instead of including it.")
@click.option(
    "--outtype",
    type=click.Choice(["f32", "f16", "q8_0", "q4_0"]),
    help="gguf: data type of the weights [f16; f32 for gguf-lora].",
)
def export(
    model: Path,
    output: Path,
    layout: str,
    base_model: str | None,
    onto: str | None,
    **options: str | None,
) -> None:
    """Export an artifact or a merged model to another format.

    OUTPUT must not exist. It is created only after the result has been checked.
    """
    refuse_existing(output)
    base: Any = onto  # checked by click
    how = ExportOptions(base_model=base_model, base=base, **options)
    model = check_export(model, layout, how)
    open_model(model, base_model, output if layout in ("hf", "vllm") else None)
    console = loading_console()
    report = export_model(model, output, layout, how)
    print_lines(report["summary"], console)


@click.command("import")
@click.argument("source", type=PATH)
@click.argument("output", type=PATH)
@partial(base_option, text="Base model of an adapter, in the llava-hf layout: directory or Hub id.")
@click.option("--vision-tower", help="Vision tower of an original checkpoint, if not the one in its config.")
@template_option
@click.option(
    "--image-aspect-ratio",
    type=click.Choice(["pad", "square"]),
    help="How training made images square, if not as the files say.",
)
@click.option(
    "--quantization",
    type=click.Choice(["none", "nf4", "nf4-double"]),
    help="How an adapter's base was quantized in training [none].",
)
def import_(source: Path, output: Path, base_model: str | None, **options: Any) -> None:
    """Import a model or adapter from another tool.

    An original LLaVA-1.5 checkpoint becomes a model in the llava-hf layout; an original LoRA, mm_projector.bin or PEFT
    adapter becomes an artifact. Only tensors are read from pickled files.
    """
    refuse_existing(output)
    from lora_llava.planning.preflight import shipping

    shipping.refuse_source(source)
    if base_model is not None:
        shipping.refuse_base(base_model)
    console = loading_console()
    from lora_llava.shipping.importers import import_any

    print_lines(import_any(source, output, ImportOptions(base_model, **options)), console)
