"""What an export may be told; every format reads the fields it knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ExportReport = dict[str, Any]
"""What an export did and how it was checked; `summary` holds the lines to show."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Choices of the command line."""

    base_model: str | None = None
    """Directory or hub id of the base, if it is not where the artifact says."""
    base: Literal["dequantized", "original"] | None = None
    """Which base to write or fold into, as in `merge`; None: the one the adapter was trained on."""
    template: str | None = None
    """Name of the template that a model is asked in, where nothing beside it says so."""
    vision_tower: str | None = None
    """`llava`: name of the vision tower in its place; None: the tower goes with the model."""
    outtype: str | None = None
    """`gguf`, `gguf-lora`: how weights are stored; None: the format's own default."""


Exporter = Callable[[Path, Path, ExportOptions], ExportReport]
"""Turns `source` (an artifact, or a model in the llava-hf layout) into a new directory `output`."""


VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` may be (vllm/config/lora.py); an adapter's rank is at most that."""


def max_lora_rank(rank: int) -> int:
    """Return the smallest value of vLLM's option that takes adapters of this rank; ValueError if there is none."""
    return min(largest for largest in VLLM_RANKS if largest >= rank)
