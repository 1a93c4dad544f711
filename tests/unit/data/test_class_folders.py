"""A folder for each class of images: read with the columns that `init` proposes, which the error without them has."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from lora_llava.cli.options import parse_columns
from lora_llava.data.load import load_records
from lora_llava.data.sources.forms import class_question
from lora_llava.errors import DataError
from lora_llava.planning.proposal.look import look_at
from lora_llava.recipe.stages import DataSettings
from tests.helpers.faulty import encoded, scene


def test_class_folders_are_named_with_the_lines_that_init_writes(
    tmp_path: Path,
) -> None:
    for name in ("good", "it's: #1"):
        (tmp_path / "parts" / name).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "parts" / name / f"{number}.png").write_bytes(encoded(scene(number)))
    with pytest.raises(DataError) as caught:
        load_records(DataSettings(path=str(tmp_path / "parts")))
    lines, _, option = str(caught.value).partition("add to its data: ")[2].partition(" (in a command: ")
    (_, words) = shlex.split(option.removesuffix(")"))
    proposed = look_at(str(tmp_path / "parts")).data["columns"]
    assert yaml.safe_load(lines) == {"columns": proposed}
    assert parse_columns(words) == proposed
    assert proposed["question"] == {"text": "Which of these does the image show: good, it's: #1?"}
    records = load_records(DataSettings.model_validate({"path": str(tmp_path / "parts"), "columns": proposed}))
    assert [record.turns[1].text for record in records] == ["good", "good", "it's: #1", "it's: #1"]


@pytest.mark.parametrize(
    ("classes", "number", "names"),
    [
        (["a", "b"], 4, True),
        (["a", "b"], 3, False),
        (["a"], 9, False),
        ([], 9, False),
        (["a", "b" * 40], 9, True),
        (["a", "b" * 41], 9, False),
        (list("abcdefghijklmnopqrst"), 40, True),
        (list("abcdefghijklmnopqrstu"), 99, False),
    ],
)
def test_a_question_names_few_and_short_classes(classes: list[str], number: int, names: bool) -> None:
    question = class_question(classes, number)
    assert question == (f"Which of these does the image show: {', '.join(classes)}?" if names else None)
