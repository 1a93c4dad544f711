"""The path of data, and the split of it: what is not there is named with what is, and nothing is read instead."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest
from click.testing import CliRunner
from datasets import Dataset, DatasetDict

from lora_llava.cli import cli
from lora_llava.cli.options import split_of
from lora_llava.data.load import load_records
from lora_llava.data.sources.stored.cells import CACHE
from lora_llava.errors import DataError
from lora_llava.recipe.stages import DataSettings
from tests.helpers.broken import Project, command

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


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where the Hub was asked for; it has no data set. The current directory holds two files and two directories."""
    asked: list[str] = []

    def find(path: str, *_: object, **__: object) -> None:
        asked.append(path)
        raise datasets.exceptions.DatasetNotFoundError(path)

    monkeypatch.setattr(datasets, "load_dataset_builder", find)
    monkeypatch.setattr("lora_llava.data.sources.missing.offline", lambda: False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in ("answers.csv", "defects/train.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("q,a\n", encoding="utf-8")
    Path("scans/test").mkdir(parents=True)
    return asked


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("answer.csv", "answer.csv does not exist. Did you mean answers.csv?"),
        ("answers.cvs", "answers.cvs does not exist here. Did you mean answers.csv? If a data set of the Hub is meant"),
        ("defects/trian.json", "defects/trian.json does not exist. Did you mean defects/train.json?"),
        ("defect", "defect does not exist here. Did you mean defects?"),
        ("scans/tset", "scans/tset does not exist here. Did you mean scans/test?"),
        ("./scan", "scan does not exist. Did you mean scans?"),
        ("a/b/c", "a/b/c does not exist. Correct the path."),
        ("zoo.zip", "zoo.zip does not exist. Correct the path."),
        ("USER/zoo.tar", "USER/zoo.tar does not exist. Correct the path."),
        ("~/no such", "no such does not exist. Correct the path."),
        ("/no such", "/no such does not exist. Correct the path."),
    ],
)
def test_a_mistyped_path_is_told_before_the_hub_is_asked(asked: list[str], path: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(path)
    assert message in str(caught.value)
    assert asked == []


@pytest.mark.parametrize(
    ("path", "settings"),
    [("some/vqa-rad", {}), ("squad_v1.1", {}), ("scans/other", {}), ("defect", {"revision": "main"})],
)
def test_an_id_is_asked_for(asked: list[str], path: str, settings: dict[str, str]) -> None:
    with pytest.raises(DataError, match="no such dataset on the Hub, or no access to it"):
        read(path, **settings)
    assert asked == [path]


def test_what_was_read_from_the_hub_before_is_not_taken_for_a_path(asked: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache" / CACHE / "defect").mkdir(parents=True)
    with pytest.raises(DataError, match="no such dataset on the Hub"):
        read("defect")
    assert asked == ["defect"]


def test_without_the_hub_an_id_is_refused_at_once(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_llava.data.sources.missing.offline", lambda: True)
    with pytest.raises(
        DataError, match="some/set is not here, is not in the Hub's cache, and the Hub cannot be reached"
    ):
        read("some/set")
    assert asked == []


def test_hub_that_cannot_be_reached_is_one_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Max retries\nsecond line")

    monkeypatch.setattr("lora_llava.data.sources.missing.offline", lambda: False)
    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(DataError) as caught:
        read("some/set")
    assert str(caught.value) == (
        "some/set: the Hub cannot be reached; check the connection, or set path to a local copy"
    )


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_full_disk_of_the_cache_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_wrapped: bool) -> None:
    def write(*_: object, **__: object) -> None:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if is_wrapped:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from full
        raise full

    (tmp_path / "a.parquet").touch()
    monkeypatch.setattr(datasets, "load_dataset_builder", write)
    with pytest.raises(DataError, match="there is no space left for its cache; free some, or set HF_HOME to another"):
        read(tmp_path / "a.parquet")


def test_a_link_to_nothing_and_a_home_are_named(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("link").symlink_to("gone")
    with pytest.raises(DataError, match=r"link is a link to gone, which is not there\. Restore that"):
        read("link")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataError, match=f"~/answers.csv does not exist. Write it out: {tmp_path}/answers.csv"):
        read("~/answers.csv")


def test_waits_for_the_hub_are_bounded(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[str] = []

    @contextmanager
    def bounded() -> Iterator[None]:
        inside.append("open")
        yield

    monkeypatch.setattr("lora_llava.data.sources.columns.bounded", bounded)
    with pytest.raises(DataError):
        read("some/set")
    assert (inside, asked) == (["open"], ["some/set"])


@pytest.mark.parametrize("command", [["eval"], ["predict", "--output", "o.csv"], ["pairs", "--output", "o.json"]])
def test_a_command_is_refused_before_it_loads_anything(asked: list[str], command: list[str]) -> None:
    result = CliRunner().invoke(cli, [*command, "no-model", "--data", "answer.csv"])
    assert result.exit_code == 1
    assert "Error: answer.csv does not exist. Did you mean answers.csv?" in result.stderr


def test_a_recipe_is_refused_before_the_hub_is_asked(asked: list[str], project: Project) -> None:
    Path("defects").mkdir(exist_ok=True)
    result = command("check", project, "stages.instruct.data={path: defect, columns: {question: q, answer: a}}")
    assert result.exit_code == 2
    assert "stages.instruct.data.path: defect does not exist here. Did you mean defects?" in result.stderr
    assert asked == []
