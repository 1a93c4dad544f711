"""What the checks look at: the recipe, how the run would start, and the models that the recipe names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lora_llava.preflight.model import ModelFiles, find_model
from lora_llava.recipe import Recipe

Start = Literal["new", "overwrite", "resume"]
"""How the run would start: in an empty directory, in place of an earlier run, or as the rest of one."""


@dataclass(slots=True)
class Setup:
    """A run as it would be started; made once, read by every check."""

    recipe: Recipe
    start: Start = "new"
    near: tuple[Path, ...] = ()
    """Directories in which a misspelled name is looked for: the recipe file's and the current one."""
    models: dict[str, ModelFiles] = field(default_factory=dict)
    """The models that the base is made of, by recipe key; one that is not to be had is in it with `missing`."""

    @classmethod
    def of(cls, recipe: Recipe, start: Start, recipe_file: Path | None) -> Setup:
        """Look up the models of a recipe; `recipe_file` is where it was read from."""
        parents = [] if recipe_file is None else [recipe_file.resolve().parent]
        near = tuple(dict.fromkeys([*parents, Path.cwd()]))
        base = recipe.base
        named = {
            "base.model_name_or_path": (base.model_name_or_path, base.revision),
            "base.language_model": (base.language_model, None),
            "base.vision_tower": (base.vision_tower, None),
        }
        models = {
            key: find_model(name, revision, near, base.gguf_file if key == "base.language_model" else None)
            for key, (name, revision) in named.items()
            if name
        }
        return cls(recipe, start, near, models)
