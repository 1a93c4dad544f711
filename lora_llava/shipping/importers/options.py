"""What an import may be told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """Choices of the command line."""

    base_model: str | None = None
    """What an adapter or a projector was trained on: directory or hub id of a LLaVA in the llava-hf layout."""
    vision_tower: str | None = None
    """Where the vision tower of an original checkpoint is, if not where its config.json says."""
    template: str | None = None
    """Name of the template that an adapter was trained in, where nothing beside it or its base says so."""
