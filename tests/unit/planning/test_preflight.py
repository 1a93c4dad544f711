"""The preflight: set-ups that are broken in one way are refused by check, dry run and run with the same words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from click.testing import CliRunner

from lora_llava.cli import cli
from lora_llava.planning.preflight.run import preflight
from lora_llava.planning.preflight.setup import Setup
from lora_llava.recipe.file import load_recipe
from tests.helpers.broken import BROKEN, COMMANDS, INSTRUCT, Project, artifact, command


@pytest.mark.parametrize("name", BROKEN)
def test_k11_broken_setups_are_refused_alike(project: Project, name: str) -> None:
    break_it, words = BROKEN[name]
    overrides = break_it(project)
    before = set(project.directory.rglob("*"))
    results = [command(one, project, *overrides) for one in COMMANDS]
    assert [result.exit_code for result in results] == [2, 2, 2], results[0].output
    assert words in results[0].stderr
    assert len({result.stderr for result in results}) == 1
    assert len(results[0].stderr.splitlines()) == 1
    assert set(project.directory.rglob("*")) == before, "a refused command leaves a trace"


def test_k11_all_problems_are_said_at_once(project: Project) -> None:
    (project.directory / "train.json").unlink()
    (project.base / "config.json").unlink()
    result = command("finetune", project)
    assert result.exit_code == 2
    first, *lines = result.stderr.splitlines()
    assert first == "Error: 2 problems found before anything was started:"
    assert [line.partition(": ")[0].strip() for line in lines] == ["base.model_name_or_path", f"{INSTRUCT}.data.path"]


def test_what_is_right_passes(project: Project) -> None:
    findings = preflight(Setup.of(load_recipe(project.recipe), "new", project.recipe))
    assert findings.problems == []
    assert findings.notices == []


MODEL_COMMANDS: dict[str, list[str]] = {
    "chat": ["chat", "earlier", "What is it?", "--image", "images/1.png"],
    "eval": ["eval", "earlier", "--data", "train.json", "--image-root", "images"],
    "merge": ["merge", "earlier", "out"],
    "export": ["export", "earlier", "out", "--format", "hf"],
    "eval of a model": ["eval", "base", "--data", "train.json", "--image-root", "images"],
    "chat with a model": ["chat", "base", "What is it?"],
    "import for a base": ["import", "earlier", "out", "--base-model", "base"],
    "import": ["import", "base", "out"],
}


@pytest.mark.parametrize("name", MODEL_COMMANDS)
@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (BROKEN["base in GPTQ"][0], "it is quantized already (gptq)"),
        (BROKEN["base in FP8"][0], "it is quantized already (fp8)"),
        (BROKEN["custom code"][0], "it needs custom code (auto_map"),
    ],
)
def test_k11_other_commands_refuse_the_base_with_the_same_words(
    project: Project, name: str, break_it: Callable[[Project], list[str]], words: str
) -> None:
    artifact(project)
    break_it(project)
    result = CliRunner().invoke(cli, MODEL_COMMANDS[name])
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert not (project.directory / "out").exists()


def test_k63_a_format_is_taken_in_any_case(project: Project) -> None:
    artifact(project)
    result = CliRunner().invoke(cli, ["export", "earlier", "out", "--format", "VLLM"])
    assert result.exit_code == 0, result.output


def test_a_packaged_tower_that_does_not_exist_is_named(project: Project) -> None:
    result = command("dry run", project, "base={language_model: ./base, vision_tower: 'package:tower'}")
    assert "the package holds no package:tower. It holds package:vision_tower." in result.stderr


def test_a_llava_named_as_a_language_model_is_told_where_it_belongs(project: Project) -> None:
    result = command("dry run", project, "base={language_model: ./base, vision_tower: 'package:vision_tower'}")
    assert result.exit_code == 2
    assert "It is a whole LLaVA: name it in base.model_name_or_path, without" in result.stderr


def test_k4_the_directory_of_a_run_is_looked_at_by_all_three(project: Project) -> None:
    short = ["stages.align=null", "stages.instruct.max_steps=1", "stages.instruct.data.validation=null"]
    assert command("finetune", project, *short).exit_code == 0
    results = [command(name, project, *short) for name in COMMANDS]
    assert [result.exit_code for result in results] == [2, 2, 2]
    assert len({result.stderr for result in results}) == 1
    assert "run holds a run already" in results[0].stderr
    for option in ("--overwrite", "--resume"):
        assert command("dry run", project, *short, option).exit_code == 0
        assert command("check", project, *short, option).exit_code == 0


def test_k4_nothing_to_resume_is_said_by_all_three(project: Project) -> None:
    results = [command(name, project, "--resume") for name in COMMANDS]
    assert [result.exit_code for result in results] == [2, 2, 2]
    assert len({result.stderr for result in results}) == 1
    assert "there is nothing to resume" in results[0].stderr
