"""`Stage`: what one stage of a run is told, what it starts from, and where it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_llava.modeling.base import BaseIdentity
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.stages import AspectRatio, StageName, StageSettings
from lora_llava.run_directory import output
from lora_llava.run_directory.written import current


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a run, made by `train_stages`; everything below it takes a `Stage` or plain values."""

    recipe: Recipe
    name: StageName
    base_directory: Path
    """The base in the llava-hf layout."""
    base: BaseIdentity
    parent: Path | None = None
    """Artifact that the stage starts from; None: the base as it is."""

    @property
    def settings(self) -> StageSettings:
        """The stage's own section of the recipe."""
        return self.recipe.stage(self.name)

    @property
    def key(self) -> str:
        """Prefix of the stage's settings in the recipe."""
        return f"stages.{self.name}"

    @property
    def is_last(self) -> bool:
        """Whether the run ends with this stage."""
        return self.name == self.recipe.stage_names[-1]

    @property
    def nf4(self) -> bool:
        """Whether the language model is quantized."""
        return self.recipe.quantization.type == "nf4"

    @property
    def aspect_ratio(self) -> AspectRatio:
        """How images are made square."""
        return self.settings.image_aspect_ratio or self.recipe.images.image_aspect_ratio

    @property
    def run_directory(self) -> Path:
        """Directory of the run."""
        return self.recipe.resolved_output_dir

    @property
    def directory(self) -> Path:
        """Directory of the stage's artifact."""
        return self.run_directory / self.name

    @property
    def checkpoints(self) -> Path:
        """Directory of the stage's checkpoints."""
        return self.run_directory / output.CHECKPOINTS / self.name

    @property
    def current_checkpoints(self) -> Path:
        """The same, while the run has not yet replaced an earlier one."""
        return current(self.run_directory) / output.CHECKPOINTS / self.name
