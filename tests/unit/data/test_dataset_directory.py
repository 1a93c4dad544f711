"""A dataset of strangers: only its own files are read, and nothing in it unpacks or lasts without end."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from datasets import Dataset

from lora_llava.cli import cli
from lora_llava.data.images.read import read_image
from lora_llava.data.load import load_records
from lora_llava.data.record import ImageSource
from lora_llava.data.sources import dataset_directory
from lora_llava.errors import DataError, RecipeError
from lora_llava.recipe.file import load_recipe
from lora_llava.recipe.stages import DataSettings
from tests.helpers.artifacts import make_artifact
from tests.helpers.broken import Project, command

COLUMNS = {"question": "q", "answer": "a"}


def table(path: Path, answer: str = "a") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict({"q": ["x", "y"], "a": [answer, answer]}).to_parquet(path)
    return path


def refused(path: Path, **settings: object) -> str:
    """The message of a refusal, which comes within seconds."""
    said: list[str] = []

    def load() -> None:
        try:
            load_records(DataSettings.model_validate({"path": str(path), **settings}))
        except DataError as error:
            said.append(str(error))

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert said, "no DataError, or no end"
    return said[0]


@pytest.mark.parametrize(
    "header",
    [
        "configs:\n- config_name: default\n  data_files: ../outside/private.parquet",
        "configs:\n- config_name: default\n  data_files: {outside}/private.parquet",
        "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: [train.parquet, ../outside/*]",
        "configs:\n- config_name: default\n  data_files: http://127.0.0.1:9/x.parquet",
        "configs:\n- config_name: default\n  data_files: zip://x.parquet::../outside/x.zip",
        "configs:\n- config_name: default\n  data_dir: ../outside",
    ],
)
@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_k45_files_outside_of_a_directory_are_not_read(tmp_path: Path, header: str, card: str) -> None:
    table(tmp_path / "outside" / "private.parquet", "private")
    folder = table(tmp_path / "data" / "train.parquet").parent
    text = header.format(outside=tmp_path / "outside")
    (folder / card).write_text(f"---\n{text}\n---\n" if card == "README.md" else text, encoding="utf-8")
    said = refused(folder, columns=COLUMNS, split="train")
    assert f"{card}: data_files names" in said
    assert "outside of the directory, which is not read" in said


def test_k45_a_directory_that_names_its_own_files_is_read(tmp_path: Path) -> None:
    folder = table(tmp_path / "data" / "part" / "x.parquet").parent.parent
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: part/*.parquet\n---\n# A set: ../.. /etc",
        encoding="utf-8",
    )
    records = load_records(DataSettings.model_validate({"path": str(folder), "columns": COLUMNS, "split": "train"}))
    assert [record.turns[1].text for record in records] == ["a", "a"]
    with pytest.raises(DataError, match=r"x\.parquet is outside of the directory"):
        dataset_directory.check_files({"train": [str(tmp_path / "x.parquet")]}, folder)


@pytest.mark.parametrize("text", ["a: [", "[" * 9999])
def test_k45_metadata_that_are_broken_are_named(tmp_path: Path, text: str) -> None:
    folder = table(tmp_path / "data" / "train.parquet").parent
    (folder / "README.md").write_text(f"---\n{text}\n---\n", encoding="utf-8")
    assert "README.md: its metadata is not valid YAML" in refused(folder, columns=COLUMNS, split="train")


def test_k45_metadata_that_contain_themselves_end(tmp_path: Path) -> None:
    folder = table(tmp_path / "data" / "train.parquet").parent
    (folder / "README.md").write_text("---\na: &x [*x, *x]\ndata_files: *x\n---\n", encoding="utf-8")
    dataset_directory.check_directory(folder)


ARCHIVES: dict[str, Callable[[Path, bytes], object]] = {
    "x.json.gz": lambda path, data: path.write_bytes(gzip.compress(data)),
    "x.csv.bz2": lambda path, data: path.write_bytes(bz2.compress(data)),
    "x.csv.xz": lambda path, data: path.write_bytes(lzma.compress(data)),
    "x.zip": lambda path, data: zipped(path, data),
}


def zipped(path: Path, data: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.csv", data)


@pytest.mark.fault("records: an archive that unpacks without bounds")
@pytest.mark.parametrize("name", ARCHIVES)
def test_k48_an_archive_of_blanks_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(dataset_directory, "_HARMLESS_BYTES", 2**20)
    folder = tmp_path / "data"
    folder.mkdir()
    ARCHIVES[name](folder / name, b" " * 2**23)
    assert f"{name} unpacks to more than 1 MiB" in refused(folder, columns=COLUMNS, split="train")
    (folder / name).write_bytes(b"PK\3\4 no archive")
    assert f"{name} is damaged" in refused(folder, columns=COLUMNS, split="train")
    (folder / name).write_bytes(gzip.compress(os.urandom(2**12))[:-2_000] + bytes(2_000))
    assert f"{name} is damaged" in refused(folder, columns=COLUMNS, split="train")
    ARCHIVES[name](folder / name, os.urandom(2**18))
    dataset_directory.check_directory(folder)


@pytest.mark.parametrize("name", ARCHIVES)
def test_k48_an_archive_is_known_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As `datasets` knows it, which would unpack it under any name."""
    monkeypatch.setattr(dataset_directory, "_HARMLESS_BYTES", 2**20)
    folder = tmp_path / "data"
    folder.mkdir()
    ARCHIVES[name](folder / "x.csv", b" " * 2**23)
    assert "x.csv unpacks to more than 1 MiB" in refused(folder, columns=COLUMNS, split="train")


def test_k48_a_zip_behind_other_bytes_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_directory, "_HARMLESS_BYTES", 2**20)
    folder = tmp_path / "data"
    folder.mkdir()
    zipped(folder / "x.zip", b" " * 2**23)
    (folder / "x.csv").write_bytes(b"q,a\nx,y\n" + (folder / "x.zip").read_bytes())
    (folder / "x.zip").unlink()
    assert "x.csv unpacks to more than 1 MiB" in refused(folder, columns=COLUMNS, split="train")


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        (".7z", b"7z\xbc\xaf\x27\x1c\0\4"),
        (".rar", b"Rar!\x1a\7\1\0"),
        (".rar", b"Rar!\x1a\7\0"),
        (".zst", b"\x28\xb5\x2f\xfd"),
        (".lz4", b"\4\x22\x4d\x18"),
    ],
)
def test_k48_an_archive_without_a_known_size_is_refused(tmp_path: Path, kind: str, start: bytes) -> None:
    folder = table(tmp_path / "data" / "train.parquet").parent
    for name in (f"x.csv{kind}", "x.csv"):
        (folder / name).write_bytes(b"no archive" if name.endswith(kind) else start + bytes(99))
        assert f"{name} is a {kind} archive, which could" in refused(folder, columns=COLUMNS, split="train")
        (folder / name).unlink()
    dataset_directory.check_directory(folder)


def test_k48_no_file_of_a_directory_is_a_pipe(tmp_path: Path) -> None:
    folder = table(tmp_path / "data" / "train.parquet").parent
    os.mkfifo(folder / "x.csv")
    assert "x.csv is not a regular file" in refused(folder, columns=COLUMNS, split="train")


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.csv", "data.parquet", "data"])
@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_k48_a_data_file_is_a_file(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    columns = {} if name.endswith((".json", ".jsonl")) else {"columns": COLUMNS}
    assert f"{name} is not a regular file" in refused(path, **columns)
    good = tmp_path / "good.json"
    good.write_text(json.dumps([]), encoding="utf-8")
    assert "exclude: " in refused(good, exclude=str(path))
    with pytest.raises(RecipeError, match="is not a regular file"):
        load_recipe(path)
    with pytest.raises(DataError, match="not a regular file"):
        read_image(ImageSource("x.png", path, None))


def test_k48_eval_refuses_a_pipe(tiny_base: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data.json")
    artifact = make_artifact(tiny_base, tmp_path / "artifact")
    options = ["--data", str(tmp_path / "data.json"), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, ["eval", str(artifact), *options])
    assert done.exit_code == 1
    assert "data.json is not a regular file" in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["finetune", "dry run", "check"])
def test_k48_a_pipe_as_data_or_recipe_is_refused(project: Project, verb: str) -> None:
    os.mkfifo(project.directory / "data.json")
    done = command(verb, project, "stages.instruct.data.path=data.json")
    assert done.exit_code == 2
    assert "data.json is neither a file nor a directory. Give a regular file." in done.output
    done = command(verb, replace(project, recipe=project.directory / "data.json"))
    assert done.exit_code == 2
    assert "data.json is not a regular file" in done.output
