"""The text of a proposed recipe."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from lora_llava.conversation.encode import Turn
from lora_llava.data.record import Record
from lora_llava.planning.proposal.look import Look, _normalized
from lora_llava.planning.proposal.text import recipe_text


@pytest.mark.parametrize("name", ["recipe.yaml", "my recipe.yaml", "a\nbase: b.yaml"])
def test_the_commands_of_a_recipe_can_be_pasted_and_are_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    record = Record("1", None, (Turn("user", "What?"), Turn("assistant", "a")), "data.json, record 1")
    text = recipe_text(Look("JSON file", {"path": "data.json"}, records=[record]), tmp_path / name, "base")
    commands = [line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   lora-llava")]
    assert [shlex.split(command)[1] for command in commands] == ["check", "finetune", "finetune"]
    assert yaml.safe_load(text)["base"] == {"model_name_or_path": "base"}
    if "\n" not in name:
        assert {shlex.split(command)[2] for command in commands} == {name}


@pytest.mark.parametrize("column", ["Patienten-Nr.", "patient_id", "PATIENT NO.", "Patient", "PatientUID"])
def test_a_column_of_patients_is_known_with_its_word_for_a_number(column: str) -> None:
    assert _normalized(column) in ("patient", "patienten")
