"""Checkpoints are whole or absent: whatever fails while one is written, the one before stays and is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_llava.data.bad_records import BadRecord
from lora_llava.errors import TrainingError
from lora_llava.run_directory.claim import move_into
from lora_llava.run_directory.lock import LOCK, locked
from lora_llava.run_directory.output import note_skipped, writing_named
from lora_llava.run_directory.problems import problems_of_output_dir
from lora_llava.system.files import STAGING, file_sha256, write_text
from lora_llava.training.checkpoints.differences import _lost_guarantees
from lora_llava.training.checkpoints.files import (
    MANIFEST,
    DamagedCheckpointError,
    Progress,
    _signed,
    find_latest,
    prune,
    read_verified,
    remove_later,
    write_checkpoint,
)
from tests.helpers.disk import WRITES, Disk, full, read_only

FILES = ("adapter_model.safetensors", "optimizer.json", "optimizer.safetensors")


def progress(step: int, eval_loss: float | None = None) -> Progress:
    return Progress("instruct", step, eval_loss, 0.25, 1.5, step - 1, 100, 1.0, 2.0, 0.5, 1)


def fill(staging: Path, directory: Path) -> None:
    for number, name in enumerate(FILES):
        (staging / name).write_bytes(bytes(range(64)) * (number + 1))


def write(parent: Path, step: int, eval_loss: float | None = None) -> Path:
    facts = {"optim": "adamw_torch"}, {"device": "cpu"}
    return write_checkpoint(
        parent, progress(step, eval_loss), *facts, fill, lambda staging, to, _: move_into(staging, to)
    )


def steps(parent: Path) -> list[int]:
    return sorted(int(one.name.removeprefix("step-")) for one in parent.glob("step-*") if one.suffix == "")


def left_behind(directory: Path) -> list[Path]:
    """List files that were never given their name; a disk that fails at last may keep an empty directory."""
    return [path for one in directory.glob(f"{STAGING}*") for path in one.iterdir()]


def quiet(_: str) -> None:
    pass


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    directory = write(tmp_path / "instruct", 7, 0.1 + 0.2)
    checkpoint = read_verified(directory)
    assert checkpoint.progress == progress(7, 0.1 + 0.2)
    assert (checkpoint.memory_plan, checkpoint.facts) == ({"optim": "adamw_torch"}, {"device": "cpu"})
    assert {path.name for path in directory.iterdir()} == {*FILES, MANIFEST}
    assert find_latest(tmp_path / "instruct", quiet) == checkpoint


@pytest.mark.fault("checkpoints: a resume from one with a missing file, a truncated file, or a flipped byte")
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_changed_byte_anywhere_is_noticed(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "instruct", 7) / name
    content = path.read_bytes()
    for place in [*range(0, len(content), 7), len(content) - 1]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DamagedCheckpointError, match=name):
            read_verified(path.parent)
    path.write_bytes(content)
    read_verified(path.parent)


@pytest.mark.fault("checkpoints: a resume from one with a missing file, a truncated file, or a flipped byte")
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_missing_and_cut_files_are_noticed(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "instruct", 7) / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DamagedCheckpointError, match=name):
        read_verified(path.parent)
    path.unlink()
    with pytest.raises(DamagedCheckpointError, match=f"{name} is missing"):
        read_verified(path.parent)


def test_a_file_outside_of_its_directory_is_missing_and_never_removed(tmp_path: Path) -> None:
    outside = tmp_path / "mine.txt"
    outside.write_text("mine", encoding="utf-8")
    directory = write(tmp_path / "instruct", 7)
    content = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    del content["sha256"]
    content["files"]["../../mine.txt"] = {"bytes": 4, "sha256": file_sha256(outside)}
    (directory / MANIFEST).write_text(_signed(content), encoding="utf-8")
    with pytest.raises(DamagedCheckpointError, match=r"\.\./\.\./mine\.txt is missing"):
        read_verified(directory)
    remove_later(tmp_path / "instruct", 6)
    assert not directory.exists()
    assert outside.read_text(encoding="utf-8") == "mine"


def test_a_link_to_nothing_is_a_missing_file(tmp_path: Path) -> None:
    path = write(tmp_path / "instruct", 7) / FILES[0]
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    with pytest.raises(DamagedCheckpointError, match=f"{FILES[0]} is missing"):
        read_verified(path.parent)


def test_the_latest_is_the_latest_whole_one(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        write(tmp_path, step)
    (tmp_path / "step-10" / FILES[0]).write_bytes(b"")
    (tmp_path / "step-11").mkdir()
    for mine in ("step-12.partial", "step-3.removed"):
        (tmp_path / mine).mkdir()
        (tmp_path / mine / "notes.txt").write_text("mine", encoding="utf-8")
    said: list[str] = []
    found = find_latest(tmp_path, said.append)
    assert found is not None and found.progress.step == 9
    assert len(said) == 2
    assert "step-11 is damaged (checkpoint.json is missing" in said[0]
    assert "step-10 is damaged (adapter_model.safetensors has 0 bytes, not 64); resuming from step-9" in said[1]
    assert steps(tmp_path) == [2, 9, 10, 11]
    # Nothing is cleared away for how its name ends.
    assert (tmp_path / "step-12.partial/notes.txt").read_text(encoding="utf-8") == "mine"
    assert (tmp_path / "step-3.removed/notes.txt").read_text(encoding="utf-8") == "mine"
    assert find_latest(tmp_path / "none", quiet) is None


def test_a_name_that_is_not_the_step_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, 2).rename(tmp_path / "step-20")
    with pytest.raises(TrainingError, match=r"no whole checkpoint is left: .*checkpoint.json was altered.* remove"):
        find_latest(tmp_path, quiet)


@pytest.mark.fault("checkpoints: a rotation that deletes the best one, or the only good one")
@pytest.mark.parametrize(
    ("losses", "limit", "kept"),
    [
        ([None, None, None], 2, [2, 3]),
        ([0.1, 0.5, 0.3, 0.4], 2, [1, 4]),
        ([0.5, 0.1, 0.3, None], 2, [2, 4]),
        ([0.5, 0.4, 0.3], 2, [2, 3]),
        ([0.1, 0.5, 0.3, 0.4], 3, [1, 3, 4]),
        ([0.1], 2, [1]),
    ],
)
def test_rotation_keeps_the_best_and_the_last(
    tmp_path: Path, losses: list[float | None], limit: int, kept: list[int]
) -> None:
    for step, loss in enumerate(losses, start=1):
        write(tmp_path, step, loss)
        prune(tmp_path, step, limit)
    assert steps(tmp_path) == kept


@pytest.mark.fault("checkpoints: a rotation that deletes the best one, or the only good one")
def test_rotation_takes_nothing_damaged_for_good(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    # Skipped when the run was resumed from step 1: neither may push out what is whole.
    (tmp_path / "step-2" / MANIFEST).unlink()
    (tmp_path / "step-3" / FILES[0]).unlink()
    remove_later(tmp_path, 1)
    assert steps(tmp_path) == [1]
    write(tmp_path, 2)
    prune(tmp_path, 2, 2)
    assert steps(tmp_path) == [1, 2]
    assert read_verified(tmp_path / "step-1").progress.step == 1
    assert read_verified(tmp_path / "step-2").progress.step == 2


def test_changed_images_cost_equality_to_the_bit_and_changed_records_the_order() -> None:
    images, records = ("stages.instruct.data (images)", "a", "b"), ("stages.instruct.data (number of records)", 3, 4)
    [equality] = _lost_guarantees([images])
    [order] = _lost_guarantees([records])
    assert equality == "results that are bit-identical to an uninterrupted run"
    assert order.startswith("each record exactly once per epoch")
    assert _lost_guarantees([images, records]) == [equality, order]


def calls_of_a_save(directory: Path) -> list[tuple[str, str]]:
    """List what a save, and the rotation after it, do to the disk, the third time."""
    save_twice(directory)
    disk = Disk(directory)
    with pytest.MonkeyPatch.context() as patch:
        disk.install(patch)
        save(directory)
    return disk.calls


def save_twice(directory: Path) -> None:
    for step in (1, 2):
        write(directory, step)


def save(directory: Path) -> None:
    with writing_named("the checkpoint of step 3", directory):
        write(directory, 3)
        prune(directory, 3, 2)


@pytest.mark.fault("checkpoints: a full disk during a save")
@pytest.mark.parametrize(("act", "words"), [(full, "No space left"), (read_only, "Read-only file system")])
def test_an_error_at_any_point_of_a_save_leaves_the_checkpoint_before(
    tmp_path: Path, act: Callable[[str, str], None], words: str
) -> None:
    calls = calls_of_a_save(tmp_path / "counted")
    assert {name for name, _ in calls} >= {"open", "fsync", "rename", "mkdir", "unlink", "rmdir"}
    refusals = []
    for first in range(len(calls)):
        directory = tmp_path / f"{first}"
        save_twice(directory)
        with pytest.MonkeyPatch.context() as patch:
            Disk(directory, act, first).install(patch)
            try:
                save(directory)
            except TrainingError as error:
                refusals.append(str(error))
        found = find_latest(directory, lambda line: pytest.fail(line))
        assert found is not None and found.progress.step in (2, 3)
        save(directory)
        assert steps(directory) == [2, 3]
        assert left_behind(directory) == []
    assert len(refusals) > 10
    for said in refusals:
        assert words in said
        assert "MiB are free there" in said
        assert "recipe.yaml --resume" in said


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_text(path, "before")
    counting = Disk(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        counting.install(patch)
        write_text(path, "before")
    writes = [name for name, _ in counting.calls if name in WRITES]
    assert writes == ["mkdir", "open", "fsync", "replace", "fsync"]
    for first in range(len(writes)):
        with pytest.MonkeyPatch.context() as patch:
            Disk(tmp_path, full, first).install(patch)
            with pytest.raises(OSError, match="No space"):
                write_text(path, "after")
        assert path.read_text(encoding="utf-8") == ("after" if first == len(writes) - 1 else "before")
        assert [one.name for one in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.fault("checkpoints: two runs in one output directory")
def test_a_second_run_in_a_directory_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from lora_llava.run_directory.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(TrainingError, match=f"in use by another run .process {other.pid}."),
            locked(tmp_path / "run"),
        ):
            pytest.fail("two runs at once")
        for start in ({}, {"overwrite": True}, {"resume": True}):
            [problem] = problems_of_output_dir(tmp_path / "run", {}, **start)
            assert problem.what.endswith("run is in use by another run")
            assert ("output_dir=PATH" in problem.fix) is ("resume" not in start)
        other.kill()
        other.wait()
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).read_text(encoding="utf-8") == f"{os.getpid()}\n"
        assert problems_of_output_dir(tmp_path / "run", {}) == []
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.fault("checkpoints: an output directory that cannot be written")
def test_a_lock_that_cannot_be_written_is_an_error_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(TrainingError, match="cannot be written"), locked(tmp_path / "file" / "run"):
        pytest.fail("no directory can be there")


def test_records_that_are_skipped_again_are_noted_once(tmp_path: Path) -> None:
    one = BadRecord("a.json", 3, "x", "record", "p")
    for part in ("align", "instruct", "instruct"):
        note_skipped(tmp_path, part, [one])
    lines = (tmp_path / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert ['"part": "align"' in lines[0], '"part": "instruct"' in lines[1], len(lines)] == [True, True, 2]
