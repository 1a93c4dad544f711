"""The answers so far: whole batches survive any kill, answers of other runs are refused."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from lora_llava.errors import ArtifactError, RecipeError
from lora_llava.generation import journal as module
from lora_llava.generation.journal import Answer, open_journal

FACTS = {"the model": "abc", "max_new_tokens": 16}
BATCHES = [{2: Answer("ja ß", -0.5, 2, False, "5/6"), 0: Answer("", -1.25, 1, True)}, {1: Answer("no", -2.0, 3, False)}]


def write(path: Path) -> bytes:
    with open_journal(path, FACTS) as journal:
        assert journal.answers == {}
        for batch in BATCHES:
            journal.add(batch)
    return path.read_bytes()


def read(path: Path, **facts: Any) -> dict[int, Answer]:
    with open_journal(path, {**FACTS, **facts}) as journal:
        return dict(journal.answers)


def test_answers_come_back(tmp_path: Path) -> None:
    write(tmp_path / "j")
    assert read(tmp_path / "j") == BATCHES[0] | BATCHES[1]


def test_a_journal_cut_at_any_byte_has_its_whole_batches_and_can_be_continued(tmp_path: Path) -> None:
    path = tmp_path / "j"
    content = write(path)
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    for length in range(len(content)):
        path.write_bytes(content[:length])
        whole = sum(end <= length for end in ends) - 1
        with open_journal(path, FACTS) as journal:
            assert list(journal.answers) == [index for batch in BATCHES[: max(0, whole)] for index in batch]
            for batch in BATCHES[max(0, whole) :]:
                journal.add(batch)
        assert path.read_bytes() == content


def test_an_empty_journal_is_removed(tmp_path: Path) -> None:
    assert read(tmp_path / "j") == {}
    assert not (tmp_path / "j").exists()


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"the model": "b"}, "differ: the model. "),
        ({"max_new_tokens": 8}, r"differ: max_new_tokens 16, now 8\. "),
        ({"the model": "b", "max_new_tokens": 8}, "differ: the model; max_new_tokens 16, now 8"),
        ({"format": 2}, r"format 1, now 2"),
    ],
)
def test_answers_of_another_prediction_are_refused_and_stay(tmp_path: Path, facts: Any, named: str) -> None:
    content = write(tmp_path / "j")
    with pytest.raises(RecipeError, match=f"has the first answers of another prediction; these {named}|{named}"):
        read(tmp_path / "j", **facts)
    assert (tmp_path / "j").read_bytes() == content


@pytest.mark.parametrize(
    "line", ["{", "1", "[]", '{"a": {}}', '{"1": {"text": "a"}}', '{"1": 5}', '{"1": {"other": 1}}', "\xff"]
)
def test_a_damaged_journal_is_refused(tmp_path: Path, line: str) -> None:
    write(tmp_path / "j")
    with (tmp_path / "j").open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    with pytest.raises(RecipeError, match=r"j is damaged; remove it to ask all questions again"):
        read(tmp_path / "j")


def test_two_processes_do_not_write_one_journal(tmp_path: Path) -> None:
    with open_journal(tmp_path / "j", FACTS) as journal:
        journal.add(BATCHES[0])
        with pytest.raises(RecipeError, match="in use: another process writes these answers"):
            read(tmp_path / "j")
    assert read(tmp_path / "j") == BATCHES[0]


def test_a_directory_is_no_journal(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not a regular file"):
        read(tmp_path)


def test_a_full_disk_keeps_the_whole_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j"

    def full(file: Any, line: Any) -> None:
        file.write(json.dumps(line).encode()[:20])
        file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_journal(path, FACTS) as journal:
        journal.add(BATCHES[0])
        with monkeypatch.context() as patch:
            patch.setattr(module, "_append", full)
            with pytest.raises(ArtifactError, match=r"No space left.*The answers so far stay in j; free some space"):
                journal.add(BATCHES[1])
        assert journal.answers == BATCHES[0]
    assert read(path) == BATCHES[0]


def test_an_error_of_another_disk_is_not_one_of_the_journal(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output error") as caught, open_journal(tmp_path / "j", FACTS):
        raise OSError(errno.EIO, "Input/output error", "model.safetensors")
    assert caught.value.filename == "model.safetensors"


def test_a_journal_that_its_owner_removes_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = module.fcntl.flock

    def finish_first(file: Any, how: int) -> None:
        (tmp_path / "j").unlink()
        lock(file, how)

    monkeypatch.setattr(module.fcntl, "flock", finish_first)
    with pytest.raises(RecipeError, match="was removed by another process, which finished these answers"):
        read(tmp_path / "j")
