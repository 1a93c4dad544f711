"""The recipe loader: whatever the file and the overrides hold, a recipe that works or an error of one kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lora_llava.errors import RecipeError
from lora_llava.recipe.file import bundled_recipes, dump_resolved, load_recipe
from tests.fuzz.mutations import NASTY_TEXT, VALUES, changed_bytes, changed_value

TEXTS = [path.read_bytes() for path in bundled_recipes().values()]
PLAIN = [yaml.safe_load(text) for text in TEXTS]
KEYS = ["seed", "name", "base", "stages.instruct", "stages.instruct.data.path", "adapter.r", "output_dir", "evaluation"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def load(folder: Path, content: bytes, overrides: list[str]) -> None:
    path = folder / "recipe.yaml"
    path.write_bytes(content)
    try:
        recipe = load_recipe(path, overrides)
    except RecipeError as error:
        assert str(error)
        return
    path.write_text(dump_resolved(recipe, folder), encoding="utf-8")
    assert load_recipe(path) == recipe.model_copy(update={"output_dir": recipe.resolved_output_dir})


@pytest.mark.fault("recipe: YAML anchors and aliases, and the bombs made of them")
@given(content=changed_bytes(TEXTS))
def test_changed_text(folder: Path, content: bytes) -> None:
    load(folder, content, [])


@pytest.mark.fault("recipe: a YAML tag that would run Python")
@given(data=st.data())
def test_changed_values_and_overrides(folder: Path, data: st.DataObject) -> None:
    made: Any = data.draw(changed_value(data.draw(st.sampled_from(PLAIN))))
    content = yaml.safe_dump(made, allow_unicode=True).encode("utf-8", "surrogatepass")
    keys = st.sampled_from(KEYS) | NASTY_TEXT
    values = VALUES.map(str) | NASTY_TEXT
    overrides = data.draw(st.lists(st.builds("{}={}".format, keys, values) | NASTY_TEXT, max_size=3))
    load(folder, content, overrides)
