"""Lines to paste, into a recipe or a shell, mean the same there, whatever a path holds."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner

from lora_llava.cli import cli
from lora_llava.data.load import load_records
from lora_llava.errors import DataError
from lora_llava.recipe.file import bundled_recipes, one_line, read_recipe
from lora_llava.recipe.stages import DataSettings
from lora_llava.run_directory.output import resume_command
from tests.helpers.published_sets import SETS

ODD = "it's: #1 {ä}, $HOME"


@pytest.fixture(autouse=True)
def _in_its_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "text", [ODD, "a: b", "#a", "a #b", "yes", "1e-4", "1:30", "0x1", "~", "null", "", "a\n b", "[a"]
)
def test_one_line_is_read_back_in_a_recipe_and_elsewhere(text: str) -> None:
    settings = {"path": text, "columns": {"question": {"text": text}}}
    assert "\n" not in one_line(settings)
    assert yaml.safe_load(one_line(settings)) == settings
    Path("r.yaml").write_text(
        f"name: a\nbase: {{model_name_or_path: x/y}}\ncard: {{limits: {one_line(text)}}}\n"
        f"stages: {{instruct: {{data: {one_line({'path': 'a.json', 'answer_prompt': text})}}}}}\n",
        encoding="utf-8",
    )
    recipe = read_recipe(Path("r.yaml"), [f"card.tags=[{one_line([text])[1:-1]}]"])
    assert (recipe.card.limits, recipe.card.tags) == (text, [text])
    assert recipe.stage("instruct").data.answer_prompt == text


def test_convert_prints_settings_of_data() -> None:
    Path("in").mkdir()
    SETS["r2gen"][1](Path("in"))
    done = CliRunner().invoke(cli, ["convert", "r2gen", "in", ODD])
    assert done.exit_code == 0, done.output
    lines = [line for line in done.output.splitlines() if line.startswith("In a recipe: ")]
    data = [yaml.safe_load(line.removeprefix("In a recipe: "))["data"] for line in lines]
    assert data[0] == {"path": f"{ODD}/train.jsonl", "group": "group"}
    assert all(load_records(DataSettings.model_validate(settings)) for settings in data)


def test_commands_are_words_of_a_shell() -> None:
    assert shlex.split(resume_command(Path(ODD))) == ["lora-llava", "finetune", f"{ODD}/recipe.yaml", "--resume"]
    name = sorted(bundled_recipes())[0]
    done = CliRunner().invoke(cli, ["recipes", "copy", name, "--to", ODD])
    assert shlex.split(done.output.partition("run it with: ")[2]) == ["lora-llava", "finetune", ODD]


def test_init_prints_the_next_command(tiny_base: Path) -> None:
    Path("a.csv").write_text(
        "question,answer\n" + "".join(f"Is {n} even?,{n % 2}\n" for n in range(20)), encoding="utf-8"
    )
    done = CliRunner().invoke(cli, ["init", "a.csv", "--output", f"{ODD}.yaml", "--base-model", str(tiny_base)])
    assert done.exit_code == 0, done.output
    command = shlex.split(done.output.partition("Next: ")[2])
    assert command == ["lora-llava", "finetune", f"{ODD}.yaml", "--dry-run"]


def test_a_file_that_is_not_read_comes_with_a_command_that_converts_it() -> None:
    Path(f"{ODD}.xls").write_bytes(b"PK")
    with pytest.raises(DataError) as caught:
        load_records(DataSettings(path=f"{ODD}.xls"))
    words = shlex.split(str(caught.value).partition("for instance: ")[2])
    assert words[:2] == ["python", "-c"]
    names: list[str] = []
    table = SimpleNamespace(to_csv=lambda name, **_: names.append(name))
    pandas = SimpleNamespace(read_excel=lambda name: names.append(name) or table)
    exec(words[2].removeprefix("import pandas; "), {"pandas": pandas})
    assert names == [f"{ODD}.xls", f"{ODD}.csv"]


def test_check_prints_the_override_that_leaves_bad_records_out(tiny_base: Path) -> None:
    rows = [*(f"Is {number} even?,{number % 2}" for number in range(20)), "Is it?,"]
    Path("a.csv").write_text("\n".join(["question,answer", *rows]), encoding="utf-8")
    Path("r.yaml").write_text(
        f"name: a\nbase: {{model_name_or_path: {one_line(str(tiny_base))}}}\nadapter: {{r: 4, lora_alpha: 8}}\n"
        "stages: {instruct: {data: {path: a.csv, columns: {question: question, answer: answer}}}}\n",
        encoding="utf-8",
    )
    done = CliRunner().invoke(cli, ["check", "r.yaml", "--output", ODD])
    assert done.exit_code == 1, done.output
    line = next(line for line in done.output.splitlines() if "can be left out with" in line)
    [override] = shlex.split(line.partition("1 bad record can be left out with ")[2])
    again = CliRunner().invoke(cli, ["check", "r.yaml", override, "--output", "again"])
    assert again.exit_code == 0, again.output
