"""Export an artifact or a model to the layouts of other tools.

FORMATS names the module and the function of each layout; the module, with torch, is imported when it is called.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from lora_llava.errors import RecipeError
from lora_llava.shipping.export.options import Exporter, ExportOptions, ExportReport
from lora_llava.system.text import listed


def _lazy(module: str, function: str) -> Exporter:
    def exporter(source: Path, output: Path, options: ExportOptions) -> ExportReport:
        from lora_llava.modeling.merged import check_merged

        check_merged(source)
        run: Exporter = getattr(import_module(f"{__name__}.{module}"), function)
        return run(source, output, options)

    return exporter


FORMATS: dict[str, Exporter] = {
    "hf": _lazy("hf", "export_hf"),
    "llava": _lazy("llava", "export_llava"),
    "gguf": _lazy("gguf.model", "export_gguf"),
    "gguf-lora": _lazy("gguf.lora", "export_gguf_lora"),
    "vllm": _lazy("vllm", "export_vllm"),
}
"""Exporters by the layout's name on the command line."""
_ONLY_FOR = {
    "--onto": ("base", ("hf", "gguf", "gguf-lora", "vllm")),
    "--vision-tower": ("vision_tower", ("llava",)),
    "--outtype": ("outtype", ("gguf", "gguf-lora")),
}
"""Options that only some layouts take: their names on the command line and in ExportOptions, and the layouts."""


def export(source: Path | str, output: Path | str, layout: str, options: ExportOptions | None = None) -> ExportReport:
    """Write an artifact or a model in the llava-hf layout to `output`, which must not exist, in another layout.

    `layout`: a key of FORMATS. Returns what was written and how it was checked. Raises RecipeError for an unknown
    layout, ArtifactError or ModelError for a model that cannot be exported.
    """
    if layout not in FORMATS:
        raise RecipeError(f"layout {layout!r} is unknown; one of {', '.join(FORMATS)}")
    options = options or ExportOptions()
    _refuse_unused(layout, options)
    from lora_llava.artifact import is_artifact, read_usage
    from lora_llava.system.hub.artifact import located

    model = located(source)
    usage = read_usage(model, options.template)
    if (options.base_model or options.base) and not is_artifact(model):
        raise RecipeError(f"{model} is a whole model and needs no base; leave --base-model and --onto out")
    report = FORMATS[layout](model, Path(output), options)
    if (window := usage.window) is not None:
        low, high = window
        report["window"] = list(window)
        report.setdefault("summary", []).append(
            f"Trained with images.window [{low:g}, {high:g}], which other software does not know: first convert gray "
            f"images of more than 8 bits to 8 bits, with {low:g} as black and {high:g} as white"
        )
    return report


def _refuse_unused(layout: str, options: ExportOptions) -> None:
    """Raise RecipeError for an option that the layout does not take."""
    for option, (name, layouts) in _ONLY_FOR.items():
        if getattr(options, name) is not None and layout not in layouts:
            raise RecipeError(f"{option} has no effect on --format {layout}, only on {listed(layouts)}; leave it out")
