"""The path of data, and the split of it: what is not there is named with what is, and nothing is read instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from lora_llava.cli.options import split_of
from lora_llava.data.load import load_records
from lora_llava.errors import DataError
from lora_llava.recipe.stages import DataSettings

TABLE = {"q": ["x", "y"], "a": ["1", "2"]}
COLUMNS = {"question": "q", "answer": "a"}


def read(path: Path | str, **settings: object) -> list[str]:
    """The questions of data, as they are read."""
    data = DataSettings.model_validate({"path": str(path), "columns": COLUMNS, **settings})
    return [record.question for record in load_records(data)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    Dataset.from_dict(TABLE).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("split", ["test", "trian", "train[:1]", "", "../other"])
def test_a_saved_set_without_splits_has_train_alone(saved: Path, split: str) -> None:
    assert read(saved) == read(saved, split="train") == ["x", "y"]
    with pytest.raises(DataError) as caught:
        read(saved, split=split)
    assert str(caught.value).startswith(f"saved: split: there is no {split!r}; it has train. Name one of them")


def test_a_saved_set_with_splits_has_these(tmp_path: Path) -> None:
    DatasetDict({"a": Dataset.from_dict(TABLE), "b": Dataset.from_dict(TABLE)}).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved", split="b") == ["x", "y"]
    with pytest.raises(DataError, match=r"there is no 'train'; it has a, b. Name one of them"):
        read(tmp_path / "saved")


def test_a_command_asks_about_the_only_split(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert split_of(str(saved), None, "test") == "train"
    assert "the questions are those of train, the only split of" in capsys.readouterr().err
    assert split_of(str(saved), "test", "test") == "test"
