"""What was trained, in the layouts of others.

Each format is a function in FORMATS; what is heavy is imported when it is called.
"""

from __future__ import annotations

from pathlib import Path

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
"""Every format by its name on the command line."""
