"""Locate the base of a run, or assemble it in the run's directory, and hash its weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lora_llava.errors import RecipeError, TrainingError
from lora_llava.modeling.assemble import assemble
from lora_llava.modeling.base import BaseIdentity, hash_weights
from lora_llava.modeling.identity import base_fields
from lora_llava.modeling.metadata import locate, read_config
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.unused import unlike_the_model
from lora_llava.run_directory import output
from lora_llava.run_directory.claim import place
from lora_llava.run_directory.written import current, is_pending
from lora_llava.system.files import Place, place_new, shown_path, staged


def prepare_base(recipe: Recipe, directory: Path, summary: dict[str, Any]) -> tuple[Path, BaseIdentity]:
    """Locate the base, or assemble it from its parts inside the run's directory; return its directory and identity.

    Reuses a base that an earlier session assembled, and raises TrainingError if its hash is not that of the summary.
    """
    settings = recipe.base
    if settings.model_name_or_path:
        base_directory, revision = locate(settings.model_name_or_path, settings.revision)
        if unlike := list(unlike_the_model(recipe, read_config(base_directory).to_dict())):
            raise RecipeError("\n".join(map(str, unlike)))
        name = settings.model_name_or_path if revision else base_directory.resolve().name
        return base_directory, _identity(name, revision, base_directory)
    base_directory, name = current(directory) / output.BASE, f"{recipe.name}-{output.BASE}"
    place_base: Place = place_new if is_pending(directory) else partial(place, directory)
    if not base_directory.exists():
        with output.writing_named("the base", directory), staged(base_directory, place_base) as staging:
            assemble(settings, staging, recipe.seed)
    identity = _identity(name, None, base_directory)
    if summary.setdefault("base_sha256", identity.weights_sha256) != identity.weights_sha256:
        raise TrainingError(
            f"{shown_path(base_directory)} was altered: its weights are {identity.weights_sha256}, the run's are "
            f"{summary['base_sha256']}. Remove it, so that it is assembled again; if that does not help, its parts "
            "have changed: put the old ones back, or start a new run with another output_dir"
        )
    return base_directory, identity


def _identity(name: str, revision: str | None, directory: Path) -> BaseIdentity:
    return BaseIdentity(name, revision, hash_weights(directory), base_fields(directory))
