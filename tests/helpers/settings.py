"""Another value for any setting of a recipe, so that tests can change each alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from lora_llava.errors import RecipeError
from lora_llava.recipe.fields import Setting, settings_of, value_at
from lora_llava.recipe.file import read_recipe
from lora_llava.recipe.settings import Recipe

GENERAL: tuple[Any, ...] = (False, True, 3, 2, 0.5, 0.25, "other", ["other"], "other.json", -1, "other-name")


def other_values(path: Path, *overrides: str) -> dict[str, str]:
    """Return, by key, an override of every setting of a recipe that gives it another value and can be loaded.

    Settings of sections that the recipe does not have are left out. Looked for once for the same recipe.
    """
    return dict(_other_values(path, overrides))


@cache
def _other_values(path: Path, overrides: tuple[str, ...]) -> dict[str, str]:
    recipe = read_recipe(path, overrides)
    found = {}
    for setting in settings_of(Recipe):
        above = setting.key.rpartition(".")[0]
        if above and value_at(recipe, above) is None:
            continue
        now = value_at(recipe, setting.key)
        values = (one for one in (*_literals(setting.field.annotation), *GENERAL) if one != now)
        found[setting.key] = next(_loading(path, overrides, setting, now, values), "")
    return {key: override for key, override in found.items() if override}


def _loading(
    path: Path, overrides: tuple[str, ...], setting: Setting, before: Any, values: Iterator[Any]
) -> Iterator[str]:
    """Yield the overrides that make a recipe that loads, in which the value has changed."""
    for value in values:
        override = f"{setting.key}={json.dumps(value)}"
        try:
            if value_at(read_recipe(path, (*overrides, override)), setting.key) != before:
                yield override
        except RecipeError:
            continue


def _literals(annotation: Any) -> list[Any]:
    """List the values that a type names."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for part in get_args(annotation) for value in _literals(part)]
