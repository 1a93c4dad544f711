"""Export an artifact or a model to the layouts of other tools.

FORMATS lists one function for each layout; it imports torch and the rest when it is called.
"""

from __future__ import annotations

from pathlib import Path

from lora_llava.errors import RecipeError
from lora_llava.shipping.export.options import Exporter, ExportOptions, ExportReport


def _hf(source: Path, output: Path, options: ExportOptions) -> ExportReport:
    from lora_llava.shipping.export.hf import export_hf

    return export_hf(source, output, options)


def _llava(source: Path, output: Path, options: ExportOptions) -> ExportReport:
    from lora_llava.shipping.export.llava import export_llava

    return export_llava(source, output, options)


def _gguf(source: Path, output: Path, options: ExportOptions) -> ExportReport:
    from lora_llava.shipping.export.gguf.model import export_gguf

    return export_gguf(source, output, options)


def _gguf_lora(source: Path, output: Path, options: ExportOptions) -> ExportReport:
    from lora_llava.shipping.export.gguf.lora import export_gguf_lora

    return export_gguf_lora(source, output, options)


def _vllm(source: Path, output: Path, options: ExportOptions) -> ExportReport:
    from lora_llava.shipping.export.vllm import export_vllm

    return export_vllm(source, output, options)


FORMATS: dict[str, Exporter] = {
    "hf": _hf,
    "llava": _llava,
    "gguf": _gguf,
    "gguf-lora": _gguf_lora,
    "vllm": _vllm,
}
"""Exporters by the layout's name on the command line."""


def export(source: Path | str, output: Path | str, layout: str, options: ExportOptions | None = None) -> ExportReport:
    """Write an artifact or a model in the llava-hf layout to `output`, which must not exist, in another layout.

    `layout`: a key of FORMATS. Returns what was written and how it was checked. Raises RecipeError for an unknown
    layout, ArtifactError or ModelError for a model that cannot be exported.
    """
    if layout not in FORMATS:
        raise RecipeError(f"layout {layout!r} is unknown; one of {', '.join(FORMATS)}")
    return FORMATS[layout](Path(source), Path(output), options or ExportOptions())
