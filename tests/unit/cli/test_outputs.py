"""Commands whose output cannot be written: refused, naming the directory, before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from lora_llava.cli import cli

COMMANDS = {
    "convert": ["convert", "coco", "data", "locked/new/parts"],
    "init": ["init", "data", "--output", "locked/new/recipe.yaml"],
    "merge": ["merge", "model", "locked/merged"],
    "pairs": ["pairs", "model", "--data", "data.json", "--output", "locked/pairs.json"],
    "eval": ["eval", "model", "--data", "data.json", "--output", "locked/evaluation"],
    "eval into an empty directory": ["eval", "model", "--data", "data.json", "--output", "locked"],
    "check": ["check", "medical_vqa.yaml", "--fix", "locked/clean"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_directory_without_permission_is_named_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    CliRunner().invoke(cli, ["recipes", "copy", "medical_vqa"])
    locked = tmp_path / "locked"
    locked.mkdir()
    # Root may write everywhere, so permissions alone would make a test that depends on the user.
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != locked)
    result = CliRunner().invoke(cli, COMMANDS[name])
    assert result.exit_code in (1, 2), result.output
    said = " ".join(result.output.split())
    output = next(word for word in COMMANDS[name] if word.startswith("locked"))
    assert f"{output} cannot be created: no permission to write to {locked}; change its permissions, or" in said
    assert not any(locked.iterdir())
