"""`Stage`: the settings of one stage of a run, what it starts from, and where it writes.

A stage can be trained without a whole run around it, as in a notebook:

    with claimed(recipe.resolved_output_dir, recipe.plain()):
        base_directory, base = prepare_base(recipe, recipe.resolved_output_dir, {})
        train_stage(Stage(recipe, "instruct", base_directory, base), Console())
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_llava.conversation.templates import Template, get_template
from lora_llava.data.rows import ImageTransform
from lora_llava.modeling.base import BaseIdentity, LoadedModel
from lora_llava.recipe.settings import AdapterSettings, QuantizationSettings, Recipe
from lora_llava.recipe.stages import AspectRatio, StageName, StageSettings
from lora_llava.run_directory import output
from lora_llava.run_directory.written import current


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a run, made once in `training.run`; functions below it take a `Stage` or plain values."""

    recipe: Recipe
    name: StageName
    base_directory: Path
    """The base in the llava-hf layout."""
    base: BaseIdentity
    parent: Path | None = None
    """Artifact that the stage starts from; None: the base without training."""

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
    def seed(self) -> int:
        """Seed of the run."""
        return self.recipe.seed

    @property
    def quantization(self) -> QuantizationSettings:
        """Precision of the language model's frozen linear layers."""
        return self.recipe.quantization

    @property
    def nf4(self) -> bool:
        """Whether the language model is quantized to NF4."""
        return self.quantization.type == "nf4"

    @property
    def adapter(self) -> AdapterSettings:
        """LoRA settings, which `instruct` and `prefer` train with."""
        return self.recipe.adapter

    @property
    def template(self) -> Template:
        """Chat template of the conversations."""
        return get_template(self.settings.template, self.settings.system)

    @property
    def aspect_ratio(self) -> AspectRatio:
        """How images become square."""
        return self.settings.image_aspect_ratio or self.recipe.images.image_aspect_ratio

    def image_transform(self, loaded: LoadedModel) -> ImageTransform:
        """Return the transform from an image to `pixel_values` (3, H, W) of the model's size and normalization."""
        return ImageTransform(
            size=loaded.image_size, mean=loaded.image_mean, std=loaded.image_std, aspect_ratio=self.aspect_ratio
        )

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
        """Where the checkpoints go until the run has replaced an earlier one in its directory."""
        return current(self.run_directory) / output.CHECKPOINTS / self.name
