"""The command line's promises: quick help, one message an error, exit codes."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import click
import datasets
import pytest
from click.testing import CliRunner

from lora_llava import __version__
from lora_llava.cli import cli
from lora_llava.cli.common import KitGroup, file_size, memory_size
from lora_llava.cli.evaluate import evaluate
from lora_llava.cli.options import parse_columns
from lora_llava.errors import DataError, RecipeError
from lora_llava.recipe.columns import ColumnSettings
from lora_llava.recipe.file import bundled_recipes, load_recipe
from lora_llava.recipe.settings import EvaluationSettings, MetricSetting

HEAVY = ("torch", "transformers", "peft", "datasets", "pydantic", "rich", "matplotlib")


def group_raising(error: BaseException) -> click.Group:
    """Build a command line whose one command fails with `error`."""

    @click.group(cls=KitGroup)
    @click.option("--debug", is_flag=True)
    def group(debug: bool) -> None:
        pass

    @group.command()
    def fail() -> None:
        raise error

    return group


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys\nfrom lora_llava.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    for option in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, check=True)
        assert "heavy: []" in done.stdout
        assert done.stderr == ""


def test_python_m_runs_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "lora_llava", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"lora-llava {__version__}\n"


COMMANDS = (
    "quickstart init convert check finetune eval predict pairs chat merge export import push inspect recipes env"
).split()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = CliRunner().invoke(cli, [command, "--help"])
    assert result.exit_code == 0
    [line] = [line for line in CliRunner().invoke(cli, ["--help"]).output.splitlines() if f"  {command} " in line]
    assert line.endswith("."), "cut off"
    assert not line.endswith("...")


def test_data_sets_are_read_without_bars_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "HF_DATASETS_DISABLE_PROGRESS_BARS"
    assert name in inspect.getsource(datasets.config), "the library has another name for it"
    for options, value in (([], "1"), (["--debug"], None)):
        monkeypatch.delenv(name, raising=False)
        assert CliRunner().invoke(cli, [*options, "recipes", "list"]).exit_code == 0
        assert os.environ.get(name) == value


@pytest.mark.parametrize(
    ("given", "count"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_threads_sleep_soon_unless_the_environment_says_how(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], count: str | None
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        # Set first, so that what the command sets is taken back after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert CliRunner().invoke(cli, ["recipes", "list"]).exit_code == 0
    assert os.environ.get("GOMP_SPINCOUNT") == count


def test_version() -> None:
    assert __version__ in CliRunner().invoke(cli, ["--version"]).output


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RecipeError("recipe.yaml: wrong"), 2, "Error: recipe.yaml: wrong\n"),
        (DataError("train.json, record 3: broken"), 1, "Error: train.json, record 3: broken\n"),
        (KeyError("x"), 1, "Error: KeyError: 'x' (run again with --debug for the traceback)\n"),
        (ValueError("two\nlines"), 1, "Error: ValueError: two lines (run again with --debug for the traceback)\n"),
        (RuntimeError(), 1, "Error: RuntimeError (run again with --debug for the traceback)\n"),
        (KeyboardInterrupt(), 130, "\nstopped\n"),
    ],
)
def test_an_error_is_one_message_and_a_code(error: BaseException, code: int, message: str) -> None:
    result = CliRunner().invoke(group_raising(error), ["fail"])
    assert result.exit_code == code
    assert result.stderr == message
    assert result.stdout == ""


@pytest.mark.parametrize("args", [["--debug", "fail"], ["fail", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(args: list[str]) -> None:
    result = CliRunner().invoke(group_raising(DataError("broken")), args)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("Error: broken\n")


@pytest.mark.parametrize("args", [["nonsense"], ["finetune"], ["finetune", "r.yaml", "--nonsense"], ["chat"]])
def test_wrong_use_exits_2(args: list[str]) -> None:
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 2
    assert "Usage" in result.stderr


@pytest.mark.parametrize("command", ["finetune", "check"])
def test_a_run_cannot_start_over_and_continue(command: str) -> None:
    result = CliRunner().invoke(cli, [command, "recipe.yaml", "--overwrite", "--resume"])
    assert result.exit_code == 2
    assert "give only one of them" in result.stderr


def test_the_name_of_a_bundled_recipe_is_explained() -> None:
    name = sorted(bundled_recipes())[0]
    for given in (name, f"{name}.yaml"):
        result = CliRunner().invoke(cli, ["finetune", given])
        assert result.exit_code == 2
        assert f"lora-llava recipes copy {name}" in result.stderr


def test_a_missing_recipe_is_named() -> None:
    result = CliRunner().invoke(cli, ["finetune", "no-such-file.yaml"])
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: there is no recipe file no-such-file.yaml")


def test_the_recipe_file_with_the_nearest_name_is_suggested(tmp_path: Path) -> None:
    for name in ("inspection.yaml", "mine.csv"):
        (tmp_path / name).touch()
    wrong, right = tmp_path / "inspektion.yml", tmp_path / "inspection.yaml"
    said = CliRunner().invoke(cli, ["finetune", str(wrong)]).stderr
    assert said == f"Error: there is no recipe file {wrong}. Did you mean {right}?\n"
    other = CliRunner().invoke(cli, ["finetune", str(tmp_path / "mine.yaml")]).stderr
    assert "the bundled ones are" in other


def test_a_chat_without_stdin_asks_for_the_question(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.stdin = None; from lora_llava.cli import cli; cli()"]
    done = subprocess.run([*command, "chat", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "stdin is closed, so no question can be read from it; give a QUESTION" in done.stderr


def test_recipes_are_listed_and_copied_once(tmp_path: Path) -> None:
    listed = CliRunner().invoke(cli, ["recipes", "list"])
    assert all(line.endswith(".") for line in listed.output.splitlines())
    names = [line.split()[0] for line in listed.output.splitlines()]
    assert names == sorted(bundled_recipes())
    target = tmp_path / "mine.yaml"
    args = ["recipes", "copy", names[0], "--to", str(target)]
    assert CliRunner().invoke(cli, args).exit_code == 0
    assert target.read_bytes() == bundled_recipes()[names[0]].read_bytes()
    target.write_text("edited", encoding="utf-8")
    again = CliRunner().invoke(cli, args)
    assert again.exit_code == 2
    assert "is not overwritten" in again.stderr
    assert target.read_text(encoding="utf-8") == "edited"


def test_a_recipe_is_copied_into_a_directory(tmp_path: Path) -> None:
    name = sorted(bundled_recipes())[0]
    assert CliRunner().invoke(cli, ["recipes", "copy", name, "--to", str(tmp_path)]).exit_code == 0
    assert (tmp_path / f"{name}.yaml").is_file()


def test_an_unknown_recipe_is_not_copied() -> None:
    result = CliRunner().invoke(cli, ["recipes", "copy", "nonsense"])
    assert result.exit_code == 2
    assert "there is no recipe nonsense" in result.stderr
    assert "Did you mean" not in result.stderr
    assert "Did you mean medical_vqa?" in CliRunner().invoke(cli, ["recipes", "copy", "medical"]).stderr


def test_columns_are_parsed_and_checked() -> None:
    assert parse_columns("image=img, question=q,answer=a") == {"image": "img", "question": "q", "answer": "a"}
    assert parse_columns(None) is None
    assert parse_columns(" {question: {text: 'a, b=c?'}, answer: a}") == {
        "question": {"text": "a, b=c?"},
        "answer": "a",
    }
    for text, wrong in (
        ("{", "--columns, line 1: not valid YAML"),
        ("{1: a}", "is no mapping of YAML"),
        ("{a: !!python/name:os.system x}", "--columns, line 1: not valid YAML: could not determine a constructor"),
    ):
        with pytest.raises(click.UsageError, match=wrong):
            parse_columns(text)
    with pytest.raises(click.UsageError, match="image=COLUMN"):
        parse_columns("image")
    with pytest.raises(click.UsageError, match="each key once"):
        parse_columns("image=a,image=b")
    with pytest.raises(click.UsageError, match="--columns, line 1: key 'answer' occurs twice"):
        parse_columns("{answer: a, answer: b}")


def test_columns_of_an_option_are_read_as_those_of_a_recipe(tmp_path: Path) -> None:
    text = "{image: a, question: {text: no}, answer: {map: {1: yes, 0: off}, of: label}}"
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: x\nbase: {model_name_or_path: some/llava}\n"
        f"stages: {{instruct: {{data: {{path: t.csv, columns: {text}}}}}}}\n",
        encoding="utf-8",
    )
    written = load_recipe(path).stage("instruct").data.columns
    assert ColumnSettings.model_validate(parse_columns(text)) == written
    assert written is not None
    assert written.answer == {"map": {"1": "yes", "0": "off"}, "of": "label"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "a.json", "--columns", "image"], "image=COLUMN"),
        (["--data", "folder", "--columns", "imgae=i,question=q,answer=a"], "imgae"),
        (
            ["--data", "a.json", *("--image-root", "x") * 2],
            "--image-root is given 2 times for 1 --data: give it once for all, or once for each",
        ),
        ([*("--data", "a.json") * 3, *("--image-root", "x") * 2], "given 2 times for 3 --data"),
    ],
)
def test_eval_checks_its_options_first(options: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["eval", str(tmp_path), *options, "--output", str(tmp_path / "new")])
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(("roots", "expected"), [((), [None, None]), (("x",), ["x", "x"]), (("x", "y"), ["x", "y"])])
def test_eval_takes_several_sources(
    roots: tuple[str, ...], expected: list[str | None], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[EvaluationSettings] = []
    monkeypatch.setattr("lora_llava.evaluation.run.evaluate_candidate", lambda _, settings, *__: taken.append(settings))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.json").write_text("[]", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    options = [word for root in roots for word in ("--image-root", root)]
    sources = ["--data", "a/test.json", "--data", "b/test.json", "--max-records", "3"]
    result = CliRunner().invoke(cli, ["eval", str(tiny_base), *sources, *options, "--output", str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    data = [(source.path, source.image_root, source.max_records) for source in taken[0].data.sources]
    assert data == [("a/test.json", expected[0], 3), ("b/test.json", expected[1], 3)]


def test_eval_does_not_overwrite_results(tmp_path: Path) -> None:
    (tmp_path / "accuracy.json").touch()
    result = CliRunner().invoke(cli, ["eval", "x", "--data", "a.json", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "not overwritten" in result.stderr


def test_env_names_versions_and_no_path() -> None:
    result = CliRunner().invoke(cli, ["env"])
    assert result.exit_code == 0
    assert {"python", "torch", "device"} <= {line.split()[0] for line in result.output.splitlines()}
    assert str(Path.home()) not in result.output


def test_eval_offers_the_metrics_of_recipes() -> None:
    [option] = [one for one in evaluate.params if one.name == "metric"]
    assert list(getattr(option.type, "choices", [])) == list(get_args(MetricSetting))


def test_sizes_of_files_and_of_memory() -> None:
    assert [file_size(text) for text in ("5GB", "2 MB", "1.5GiB", "10kb")] == [5 * 10**9, 2 * 10**6, 3 * 2**29, 10**4]
    assert [memory_size(text) for text in ("12GiB", "12 gb", " 1.5MB ")] == [12 * 2**30, 12 * 2**30, 3 * 2**19]


@pytest.mark.parametrize("text", ["", "12", "GiB", "-1GiB", "0GiB", "1,5GiB", "12GiB x", "12TB"])
def test_other_sizes_are_refused(text: str) -> None:
    for parse, example in ((file_size, "2GB"), (memory_size, "12GiB")):
        with pytest.raises(click.BadParameter, match=rf"is not a size; write a number and .*such as {example}"):
            parse(text)


def test_a_problem_of_all_sources_is_reported_once_by_its_option() -> None:
    files = ["--data", "a.csv", "--data", "b.csv"]
    result = CliRunner().invoke(cli, ["eval", "model", *files, "--columns", "image=picture,questoin=text"])
    assert result.exit_code == 2
    [line] = [line for line in result.stderr.splitlines() if "--columns" in line]
    assert line == "Error: --columns.questoin: unknown key. Did you mean question?"
