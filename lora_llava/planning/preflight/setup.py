"""`Setup`: what the checks read, which is the recipe, how the run would start, and the files of its models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lora_llava.formats.shapes import LlavaShape, vision_config
from lora_llava.planning.preflight.model.files import ModelFiles, find_model
from lora_llava.recipe.settings import PROJECTOR_ACTIVATIONS, Recipe

Start = Literal["new", "overwrite", "resume"]
"""How the run would start: in a free directory, replacing an earlier run, or resuming one."""
LLAVA, LANGUAGE_MODEL, VISION_TOWER = "base.model_name_or_path", "base.language_model", "base.vision_tower"


@dataclass(slots=True)
class Setup:
    """A run that is about to start; built once, read by every check."""

    recipe: Recipe
    start: Start = "new"
    here: bool = True
    """Whether it would run on this machine; False if it is only planned for another."""
    near: tuple[Path, ...] = ()
    """Directories to search for names like a misspelled one: the recipe file's and the current one."""
    models: dict[str, ModelFiles] = field(default_factory=dict)
    """The models of the base, by recipe key; each may have a problem."""
    sound: bool = False
    """Whether the base has no problem, so that other checks can rely on it."""

    @classmethod
    def of(cls, recipe: Recipe, start: Start, recipe_file: Path | None, *, here: bool = True) -> Setup:
        """Look up the models of a recipe that was read from `recipe_file`."""
        parents = [] if recipe_file is None else [recipe_file.resolve().parent]
        near = tuple(dict.fromkeys([*parents, Path.cwd()]))
        base = recipe.base
        named = {
            LLAVA: (base.model_name_or_path, base.revision),
            LANGUAGE_MODEL: (base.language_model, None),
            VISION_TOWER: (base.vision_tower, None),
        }
        models = {
            key: find_model(name, revision, near, base.gguf_file if key == LANGUAGE_MODEL else None)
            for key, (name, revision) in named.items()
            if name
        }
        return cls(recipe, start, here, near, models)

    def usable(self) -> Iterator[tuple[str, ModelFiles]]:
        """Yield key and files of the models that can be inspected; nothing if the base has a problem."""
        if self.sound:
            yield from ((key, model) for key, model in self.models.items() if model.gguf_file is None)

    @property
    def shape(self) -> LlavaShape | None:
        """Shape of the base; None if unknown. That of a base to assemble lacks the rows that its vocabulary gains."""
        models = dict(self.usable())
        if (llava := models.get(LLAVA)) is not None:
            return LlavaShape.of(llava.config)
        if LANGUAGE_MODEL not in models or VISION_TOWER not in models:
            return None
        base = self.recipe.base
        return LlavaShape.of(
            {
                "text_config": models[LANGUAGE_MODEL].config,
                "vision_config": vision_config(models[VISION_TOWER].config),
                "projector_hidden_act": PROJECTOR_ACTIVATIONS[base.mm_projector_type],
                "vision_feature_layer": base.vision_feature_layer,
                "vision_feature_select_strategy": base.vision_feature_select_strategy,
            }
        )
