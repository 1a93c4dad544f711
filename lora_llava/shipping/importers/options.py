"""Options of an import."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """Options of the command line."""

    base_model: str | None = None
    """The base of an adapter or a projector: directory or hub id of a LLaVA in the llava-hf layout."""
    vision_tower: str | None = None
    """Directory or hub id of an original checkpoint's vision tower; None: the one that its config.json names."""
    template: str | None = None
    """Name of the template of training, if neither the adapter's files nor its base's say."""
