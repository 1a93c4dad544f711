"""The quickstart around its run: recipes next to the data, an edited one kept, commands that exist."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lora_llava.cli import cli
from lora_llava.errors import TrainingError
from lora_llava.quickstart import run as quickstart
from lora_llava.recipe.file import bundled_recipes
from lora_llava.recipe.settings import Recipe
from lora_llava.run_directory.lock import locked


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Stand in for fetching and training; returns the recipes that were run."""
    recipes: list[Recipe] = []

    def finetune(recipe: Recipe, console: Console, *, overwrite: bool) -> dict[str, Any]:
        assert overwrite
        recipes.append(recipe)
        recipe.resolved_output_dir.mkdir(exist_ok=True)
        return {"seconds": {"align": 1.0}}

    def prepare(directory: Path, say: object) -> None:
        directory.mkdir(exist_ok=True)

    monkeypatch.setattr(quickstart, "prepare_assets", prepare)
    monkeypatch.setattr(quickstart, "run_recipe", finetune)
    return recipes


def run(directory: Path) -> str:
    text = io.StringIO()
    quickstart.run_quickstart(directory, Console(file=text, width=200))
    return text.getvalue()


def test_the_bundled_recipe_is_run_in_the_directory(ran: list[Recipe], tmp_path: Path) -> None:
    run(tmp_path / "q")
    assert ran[0].resolved_output_dir == tmp_path / "q" / "run"
    summary = json.loads((tmp_path / "q" / "run" / "summary.json").read_text(encoding="utf-8"))
    assert set(summary["seconds"]) == {"prepare", "align"}
    for name in (quickstart.RECIPE, quickstart.FULL_RECIPE):
        assert (tmp_path / "q" / f"{name}.yaml").read_bytes() == bundled_recipes()[name].read_bytes()


@pytest.mark.usefixtures("ran")
def test_an_edited_recipe_is_kept(tmp_path: Path) -> None:
    run(tmp_path)
    assert "was edited" not in run(tmp_path)
    (tmp_path / "quickstart.yaml").write_text("mine", encoding="utf-8")
    assert "was edited" in run(tmp_path)
    assert (tmp_path / "quickstart.yaml.old").read_text(encoding="utf-8") == "mine"


@pytest.mark.usefixtures("ran")
def test_the_next_commands_can_be_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^  lora-llava (.*)$", run(Path("q")), flags=re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        name, *args = shlex.split(command)
        context = cli.commands[name].make_context(name, list(args))
        assert context.command is cli.commands[name]
    copied = shlex.split(commands[-1])[-1]
    assert copied in bundled_recipes()


def test_a_second_quickstart_in_a_directory_is_refused(ran: list[Recipe], tmp_path: Path) -> None:
    with locked(tmp_path / "q"), pytest.raises(TrainingError, match=r"--dir .*q is in use by another run"):
        run(tmp_path / "q")
    assert not ran
    run(tmp_path / "q")
    assert len(ran) == 1
