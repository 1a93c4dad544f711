"""Commands whose output cannot be written: refused, naming output, directory and fix, before any work."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lora_llava.cli import cli

COMMANDS = {
    "convert": ["convert", "coco", "data", "OUT/parts"],
    "init": ["init", "data", "--output", "OUT/recipe.yaml"],
    "recipes copy": ["recipes", "copy", "medical_vqa", "--to", "OUT/recipe.yaml"],
    "merge": ["merge", "model", "OUT/merged"],
    "export": ["export", "model", "OUT/exported", "--format", "hf"],
    "import": ["import", "model", "OUT/imported"],
    "predict": ["predict", "model", "--images", "data", "--question", "a?", "--output", "OUT/answers.csv"],
    "pairs": ["pairs", "model", "--data", "data.json", "--output", "OUT/pairs.json"],
    "eval": ["eval", "model", "--data", "data.json", "--output", "OUT/evaluation"],
    "eval into an empty directory": ["eval", "model", "--data", "data.json", "--output", "OUT"],
    "check --fix": ["check", "medical_vqa.yaml", "--fix", "OUT/clean"],
    "check --output": ["check", "medical_vqa.yaml", "--output", "OUT/report"],
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a recipe, an empty directory and a file."""
    monkeypatch.chdir(tmp_path)
    CliRunner().invoke(cli, ["recipes", "copy", "medical_vqa"])
    (tmp_path / "locked").mkdir()
    (tmp_path / "file").touch()
    return tmp_path


def run(name: str, output: str) -> tuple[Result, str]:
    """Run a command with its output below `output`; return the result and the name of the output."""
    arguments = [argument.replace("OUT", output, 1) for argument in COMMANDS[name]]
    return CliRunner().invoke(cli, arguments), next(word for word in arguments if word.startswith(output))


def check_refused(result: Result, message: str) -> None:
    assert result.exit_code in (1, 2), result.output
    assert message in " ".join(result.output.split())
    assert "--debug" not in result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_a_directory_without_permission_is_named_before_the_work(
    here: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    locked = here / "locked"
    # Root may write everywhere, so permissions alone would make a test that depends on the user.
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != locked)
    result, output = run(name, "locked")
    said = f"{output} cannot be created: no permission to write to {locked}; change its permissions, or give another"
    check_refused(result, said)
    assert not any(locked.iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_view_of_the_kernel_takes_no_output(here: Path, name: str) -> None:
    result, output = run(name, "/proc/nothing")
    check_refused(result, f"{output} cannot be created")
    assert " /proc" in result.output.replace(output, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_is_no_directory(here: Path, name: str) -> None:
    result, output = run(name, "file")
    check_refused(
        result, "is not a directory; give" if output == "file" else f"{output} cannot be created: {here}/file"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_a_name_that_is_too_long_is_named(here: Path, name: str) -> None:
    result, output = run(name, "x" * 300)
    check_refused(result, f"{output} cannot be created in {here}: File name too long; give a shorter name")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, "No space left on device; free some space, or give an output on another disk"),
        (errno.EROFS, "Read-only file system; give an output elsewhere"),
    ],
)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_takes_nothing_is_named_before_the_work(
    here: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int, reason: str
) -> None:
    def refuse(**_: object) -> str:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    result, output = run(name, "locked")
    check_refused(result, f"{output} cannot be created in {here / 'locked'}: {reason}")


@pytest.mark.parametrize("name", ["convert", "merge", "predict", "pairs", "eval"])
def test_the_check_of_an_output_leaves_nothing(here: Path, name: str) -> None:
    before = sorted(here.rglob("*"))
    # The data and the model do not exist, so the command fails after the check of its output.
    result, _ = run(name, "new")
    assert result.exit_code in (1, 2), result.output
    assert "cannot be created" not in result.output
    assert sorted(here.rglob("*")) == before


def test_a_recipe_is_copied_into_a_new_directory_and_never_over_a_file(here: Path) -> None:
    copy = ["recipes", "copy", "medical_vqa", "--to", "new/mine.yaml"]
    assert CliRunner().invoke(cli, copy).exit_code == 0
    (here / "new" / "mine.yaml").write_text("mine", encoding="utf-8")
    check_refused(CliRunner().invoke(cli, copy), "new/mine.yaml already exists and is not overwritten")
    assert (here / "new" / "mine.yaml").read_text(encoding="utf-8") == "mine"
