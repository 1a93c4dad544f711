"""Export an artifact or a model to the layouts of other tools. Without torch, which the module of a layout imports."""

from __future__ import annotations

from pathlib import Path

from lora_llava.errors import ArtifactError, RecipeError
from lora_llava.shipping.export.options import ExportOptions, ExportReport
from lora_llava.system.forms import Form, refuse_unused
from lora_llava.system.hub.artifact import located

FORMATS = {
    "hf": Form(f"{__name__}.hf", "export_hf", ("onto",)),
    "llava": Form(f"{__name__}.llava", "export_llava", ("vision_tower",)),
    "gguf": Form(f"{__name__}.gguf.model", "export_gguf", ("onto", "outtype")),
    "gguf-lora": Form(f"{__name__}.gguf.lora", "export_gguf_lora", ("onto", "outtype")),
    "vllm": Form(f"{__name__}.vllm", "export_vllm", ("onto",)),
}
"""Exporters by the layout's name on the command line, with the options that they take.

An exporter writes `source` (an artifact, or a model in the llava-hf layout) to a new directory `output`.
"""
_OF_ADAPTERS = {
    "gguf-lora": "export it with --format gguf",
    "vllm": "vLLM serves it directly: vllm serve DIR",
}
"""Layouts that take an artifact alone, and what to do with a whole model instead."""


def export(source: Path | str, output: Path | str, layout: str, options: ExportOptions | None = None) -> ExportReport:
    """Write an artifact or a model in the llava-hf layout to `output`, which must not exist, in another layout.

    `layout`: a key of FORMATS. Returns what was written and how it was checked. Raises errors as `check_export` does,
    and ArtifactError or ModelError for a model that cannot be exported.
    """
    options = options or ExportOptions()
    model = check_export(source, layout, options)
    from lora_llava.artifact import read_usage
    from lora_llava.modeling.merged import check_merged

    usage = read_usage(model, options.template)
    check_merged(model)
    report: ExportReport = FORMATS[layout](model, Path(output), options)
    if (window := usage.window) is not None:
        low, high = window
        report["window"] = list(window)
        report.setdefault("summary", []).append(
            f"Trained with images.window [{low:g}, {high:g}], which other software does not know: first convert gray "
            f"images of more than 8 bits to 8 bits, with {low:g} as black and {high:g} as white"
        )
    return report


def check_export(source: Path | str, layout: str, options: ExportOptions) -> Path:
    """Return the directory of a model to export, downloaded if it is one of the Hub, before anything large is imported.

    Raises RecipeError for an unknown layout, or an option that the layout or the model does not take; ArtifactError for
    a directory that is no model, and for a whole model where the layout takes an adapter.
    """
    if layout not in FORMATS:
        raise RecipeError(f"layout {layout!r} is unknown; one of {', '.join(FORMATS)}")
    given = {"onto": options.base, "vision_tower": options.vision_tower, "outtype": options.outtype}
    refuse_unused(FORMATS, layout, [name for name, value in given.items() if value is not None], "--format ")
    if layout == "gguf-lora" and options.outtype not in (None, "f32", "f16"):
        raise RecipeError(f"--outtype {options.outtype}: of gguf-lora f32 or f16; the base's own file may have any")
    # Imported here: the command line lists FORMATS before it imports pydantic.
    from lora_llava.run_directory.claim import is_artifact

    model = located(source)
    if not is_artifact(model):
        if options.base_model or options.base:
            raise RecipeError(f"{model} is a whole model and needs no base; leave --base-model and --onto out")
        if layout in _OF_ADAPTERS:
            raise ArtifactError(f"{model} is a whole model and has no adapter; {_OF_ADAPTERS[layout]}")
    return model
