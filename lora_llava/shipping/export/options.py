"""Options of an export, and its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_llava.system.files import json_text
from lora_llava.system.hub.artifact import source_facts

ExportReport = dict[str, Any]
"""What an export did and how it was checked; `summary` holds the lines to show."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Options of the command line; each layout reads those that apply to it."""

    base_model: str | None = None
    """Directory or hub id of the base, if it is not where the artifact says."""
    base: Literal["dequantized", "original"] | None = None
    """Which base to write or merge into, as in `merge`; None: the one the adapter was trained on."""
    template: str | None = None
    """Name of the template to prompt a model with, if its files do not say."""
    vision_tower: str | None = None
    """`llava`: name of the vision tower to refer to; None: the tower is written with the model."""
    outtype: str | None = None
    """`gguf`, `gguf-lora`: how weights are stored; None: the format's own default."""


REPORT = "export_report.json"


def record_source(staging: Path, source: Path) -> None:
    """Write the commit of a model from the Hub to `export_report.json`; a local directory has none to record."""
    if (facts := source_facts(source)) is not None:
        (staging / REPORT).write_text(json_text({"hub": facts}, indent=2) + "\n", encoding="utf-8")


VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's `--max-lora-rank` accepts (vllm/config/lora.py)."""


def max_lora_rank(rank: int) -> int:
    """Return the smallest accepted value that is at least `rank`; ValueError if there is none."""
    return min(largest for largest in VLLM_RANKS if largest >= rank)
