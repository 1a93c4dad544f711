"""Options of an import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """Options of the command line."""

    base_model: str | None = None
    """The base of an adapter or a projector: directory or hub id of a LLaVA in the llava-hf layout."""
    vision_tower: str | None = None
    """Directory or hub id of an original checkpoint's vision tower; None: the one that its config.json names."""
    template: str | None = None
    """Name of the template of training, if neither the adapter's files nor its base's say."""
    image_aspect_ratio: Literal["pad", "square"] | None = None
    """How training made images square; None: as the files say."""
    quantization: Literal["none", "nf4", "nf4-double"] | None = None
    """How the base of an adapter was quantized in training, which its files do not say; None: not at all."""
