"""A claim and its exchange, step by step: what is undone, what is moved, what is listed, what is in the way."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_llava.errors import TrainingError
from lora_llava.recipe.settings import Recipe
from lora_llava.run_directory import claim
from lora_llava.run_directory.claim import claimed, move_into, place, restore, restore_around
from lora_llava.run_directory.lock import LOCK, locked
from lora_llava.run_directory.problems import problems_of_output_dir
from lora_llava.run_directory.written import EXCHANGE, NEW, PENDING, STATE, read_written
from lora_llava.system.files import staging_in
from tests.helpers.claiming import Stopped, a_recipe, contents, die, forked, run
from tests.helpers.disk import Disk, read_only


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return a_recipe(tmp_path / "run")


@pytest.fixture
def root(recipe: Recipe) -> Path:
    return recipe.resolved_output_dir


def killed_in_the_exchange(recipe: Recipe) -> None:
    """Die when the checkpoint of a new run comes, after the files of the earlier run have left."""

    def act(name: str, path: str) -> None:
        if name == "rename" and path.endswith("step-1/checkpoint.json"):
            die(name, path)

    Disk(recipe.resolved_output_dir, act).install(pytest.MonkeyPatch())
    run(recipe, "new", overwrite=True)


@pytest.fixture
def interrupted(recipe: Recipe) -> dict[str, str]:
    """Interrupt the exchange of two runs; return what the earlier one had left."""
    run(recipe, "old")
    before = contents(recipe.resolved_output_dir)
    assert forked(partial(killed_in_the_exchange, recipe)) == -signal.SIGKILL
    assert contents(recipe.resolved_output_dir) != before
    return before


@pytest.mark.parametrize("inside", ["", "instruct", "checkpoints/instruct/step-3"])
def test_k32_the_earlier_run_is_put_back_around_its_artifact_or_checkpoint(
    root: Path, interrupted: dict[str, str], inside: str
) -> None:
    restore_around(root / inside)
    assert contents(root) == interrupted
    assert not (root / STATE / EXCHANGE).exists()
    assert not (root / STATE / NEW).exists()


def test_k32_an_exchange_is_left_alone_from_further_inside_or_while_a_run_works(
    root: Path, interrupted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    during = contents(root)
    restore_around(root / "checkpoints/instruct/step-3/deeper")
    assert contents(root) == during
    with locked(root):
        restore_around(root / "instruct")
    assert contents(root) == during
    # A disk that cannot be written is no reason to refuse reading.
    with monkeypatch.context() as patch:
        Disk(root, read_only).install(patch)
        restore_around(root / "instruct")
    assert contents(root) == during
    assert (root / STATE / EXCHANGE).is_file()


def test_k32_a_run_is_not_locked_to_look_for_an_exchange(recipe: Recipe, root: Path) -> None:
    run(recipe, "old")
    (root / LOCK).unlink(missing_ok=True)
    before = contents(root, kits=True)
    restore_around(root / "instruct")
    assert contents(root, kits=True) == before


def test_k32_an_exchange_that_cannot_be_undone_is_named(
    root: Path, interrupted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = r"run: a run was stopped while it replaced an earlier one, which cannot be put back: Read-only file system"
    with monkeypatch.context() as patch:
        Disk(root, read_only).install(patch)
        with pytest.raises(TrainingError, match=words):
            restore(root)
    restore(root)
    assert contents(root) == interrupted


@pytest.mark.parametrize("pending", [None, "", "{}", "[]x"])
def test_k32_a_claim_without_a_readable_note_is_undone(root: Path, pending: str | None) -> None:
    root.mkdir()
    (root / "mine").write_text("mine", encoding="utf-8")
    claim._begin(root)
    (root / STATE / NEW / PENDING).unlink()
    if pending is not None:
        (root / STATE / NEW / PENDING).write_text(pending, encoding="utf-8")
    restore(root)
    assert contents(root, kits=True).keys() == {"mine"}


def test_k32_directories_of_the_claim_go_and_those_of_the_user_stay(root: Path) -> None:
    (root / "align").mkdir(parents=True)
    claim._begin(root)
    for name in ("base", "checkpoints/instruct", "instruct"):
        (root / name).mkdir(parents=True)
    (root / "instruct/mine").write_text("mine", encoding="utf-8")
    restore(root)
    left = contents(root, kits=True).keys()
    assert {"align", "instruct", "instruct/mine"} <= left
    assert not {"base", "checkpoints/instruct", STATE} & left


def test_k32_a_claim_without_a_checkpoint_leaves_no_trace_of_its_own(recipe: Recipe, tmp_path: Path) -> None:
    root = tmp_path / "not/there/yet"

    def stop_early() -> None:
        with claimed(root, recipe.plain()):
            (root / STATE / NEW / "train_log.jsonl").write_text("{}", encoding="utf-8")
            raise Stopped

    with pytest.raises(Stopped):
        stop_early()
    assert contents(tmp_path, kits=True) == {}


def test_k32_an_occupied_directory_is_claimed_to_overwrite_or_to_resume_alone(recipe: Recipe, root: Path) -> None:
    run(recipe, "old")
    before = contents(root, kits=True)
    with pytest.raises(TrainingError, match="overwrite"), claimed(root, recipe.plain()):
        pass
    with claimed(root, recipe.plain(), resume=True):
        assert contents(root, kits=True) == before
    assert contents(root, kits=True) == before


def test_k32_a_disk_that_fails_at_the_end_of_a_claim_hides_no_error_and_the_next_command_undoes_it(
    recipe: Recipe, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.mkdir()

    def stop_on_a_failing_disk(patch: pytest.MonkeyPatch) -> None:
        with claimed(root, recipe.plain()):
            Disk(root, read_only).install(patch)
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_on_a_failing_disk(patch)
    with monkeypatch.context() as patch:
        Disk(root, read_only).install(patch)
        restore(root)
    assert (root / STATE / NEW).exists()
    restore(root)
    assert contents(root, kits=True) == {}


def test_k32_what_a_killed_copy_left_goes_with_its_claim(root: Path) -> None:
    root.mkdir()
    claim._begin(root)

    def copy_and_die() -> None:
        (root / "base").mkdir()
        with staging_in(root / "base") as staging:
            (staging / "weights").write_text("half", encoding="utf-8")
            die("", "")

    assert forked(copy_and_die) == -signal.SIGKILL
    assert (root / "base").is_dir()
    restore(root)
    assert contents(root, kits=True) == {}


def test_k32_a_directory_that_the_kit_did_not_make_is_not_restored(root: Path) -> None:
    (root / STATE / NEW).mkdir(parents=True)
    (root / STATE / NEW / "mine").write_text("mine", encoding="utf-8")
    before = contents(root, kits=True)
    restore(root)
    assert contents(root, kits=True) == before


def test_k32_every_file_of_a_run_is_listed_after_a_first_run_and_after_an_exchange(recipe: Recipe, root: Path) -> None:
    for seed in ("old", "new", "third"):
        run(recipe, seed, overwrite=seed != "old", steps=2)
        written = read_written(root)
        assert written is not None
        assert set(written.present()) == {name for name in contents(root) if (root / name).is_file()}
        assert written.versions["train_log.jsonl"][-1].grows
        assert not (root / STATE / NEW).exists()


def test_k32_manifests_of_the_earlier_run_leave_before_what_they_list(
    recipe: Recipe, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe, "old")
    before = [name for name in contents(root) if (root / name).is_file()]
    disk = Disk(root)
    with monkeypatch.context() as patch:
        disk.install(patch)
        run(recipe, "new", overwrite=True)
    renamed = [Path(path).relative_to(root).as_posix() for name, path in disk.calls if name == "rename"]
    leaving = [name for name in dict.fromkeys(renamed) if name in before]
    assert set(leaving) == set(before)
    manifests = {name for name in before if Path(name).name in ("manifest.json", "checkpoint.json")}
    assert len(manifests) >= 3
    assert set(leaving[: len(manifests)]) == manifests


def test_k43_a_file_of_the_new_run_is_copied_to_the_disk_that_its_name_is_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "instruct").mkdir(parents=True)
    (root / "align").mkdir()
    new = tmp_path / "weights"
    new.write_text("new", encoding="utf-8")
    stat = Path.stat

    def stat_of_two_disks(path: Path, **options: Any) -> Any:
        found = stat(path, **options)
        fields = {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
        return SimpleNamespace(**{**fields, "st_dev": int(path.is_relative_to(root / "instruct"))})

    monkeypatch.setattr(Path, "stat", stat_of_two_disks)
    with ExitStack() as stack:
        assert claim._on_disk_of(root, "align/weights", new, stack) == new
        copied = claim._on_disk_of(root, "instruct/step-1/weights", new, stack)
        assert (copied.parent.parent, copied.name) == (root / "instruct", "weights")
        assert copied.read_text(encoding="utf-8") == "new"
        assert copied.stat().st_mtime == new.stat().st_mtime
    assert not list((root / "instruct").iterdir())
    assert new.exists()


def test_k32_directories_with_files_of_the_user_are_the_run_s_after_an_exchange_too(recipe: Recipe, root: Path) -> None:
    run(recipe, "old")
    (root / "base/mine").write_text("mine", encoding="utf-8")
    (root / "checkpoints/instruct/step-3/mine").write_text("mine", encoding="utf-8")
    for seed in ("new", "third"):
        run(recipe, seed, overwrite=True, steps=1)
        assert problems_of_output_dir(root, recipe.plain(), overwrite=True) == []
        assert (root / "base/mine").read_text(encoding="utf-8") == "mine"
        assert (root / "checkpoints/instruct/step-3/mine").read_text(encoding="utf-8") == "mine"
        assert (root / "base/config.json").read_text(encoding="utf-8") == seed


def staged_evaluation(tmp_path: Path) -> Path:
    staged = tmp_path / "staged"
    (staged / "deep/er").mkdir(parents=True)
    (staged / "accuracy.json").write_text("again", encoding="utf-8")
    (staged / "deep/er/answers.jsonl").write_text("again", encoding="utf-8")
    return staged


def test_k32_files_of_the_run_are_replaced_and_those_of_the_user_are_in_the_way(
    recipe: Recipe, root: Path, tmp_path: Path
) -> None:
    run(recipe, "old")
    (root / "evaluation/mine").write_text("mine", encoding="utf-8")
    place(root, staged_evaluation(tmp_path), root / "evaluation")
    assert (root / "evaluation/accuracy.json").read_text(encoding="utf-8") == "again"
    assert (root / "evaluation/mine").read_text(encoding="utf-8") == "mine"
    written = read_written(root)
    assert written is not None
    assert {"evaluation/accuracy.json", "evaluation/deep/er/answers.jsonl"} <= set(written.present())
    for change in (
        lambda path: path.write_text("mine", encoding="utf-8"),
        lambda _: (root / STATE).rename(tmp_path / "s"),
    ):
        change(root / "evaluation/accuracy.json")
        before = contents(root)
        (tmp_path / "staged/accuracy.json").write_text("third", encoding="utf-8")
        with pytest.raises(TrainingError, match=r"evaluation/accuracy\.json is in the way: .* Move it elsewhere"):
            place(root, tmp_path / "staged", root / "evaluation")
        assert contents(root) == before


def test_k32_a_run_whose_log_was_removed_is_evaluated(recipe: Recipe, root: Path, tmp_path: Path) -> None:
    run(recipe, "old")
    (root / "train_log.jsonl").unlink()
    place(root, staged_evaluation(tmp_path), root / "evaluation")
    assert (root / "evaluation/accuracy.json").read_text(encoding="utf-8") == "again"


def test_k32_known_hashes_are_listed_with_the_files(recipe: Recipe, root: Path, tmp_path: Path) -> None:
    run(recipe, "old")
    place(root, staged_evaluation(tmp_path), root / "evaluation", {"accuracy.json": "00ff"})
    written = read_written(root)
    assert written is not None
    assert written.versions["evaluation/accuracy.json"][-1].sha256 == "00ff"
    assert written.versions["evaluation/deep/er/answers.jsonl"][-1].sha256 != "00ff"


def test_k32_manifests_are_moved_last(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("checkpoint.json", "manifest.json", "weights", "sub/deep/file")
    for name in names:
        (tmp_path / "staged" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "staged" / name).write_text(name, encoding="utf-8")
    (tmp_path / "staged/link").symlink_to("weights")
    (tmp_path / "staged/directory").symlink_to("sub")
    (root / "target/sub").mkdir(parents=True)
    (root / "target/weights").write_text("old", encoding="utf-8")
    (root / "target/mine").write_text("mine", encoding="utf-8")
    disk = Disk(tmp_path)
    with monkeypatch.context() as patch:
        disk.install(patch)
        move_into(tmp_path / "staged", root / "target")
    moved = [Path(path).relative_to(tmp_path / "staged").as_posix() for name, path in disk.calls if name == "replace"]
    assert moved == ["directory", "link", "sub/deep/file", "weights", "checkpoint.json", "manifest.json"]
    assert ("fsync", str(root / "target")) in disk.calls
    assert (root / "target/directory").readlink() == Path("sub")
    assert (root / "target/mine").read_text(encoding="utf-8") == "mine"
    assert [(root / "target" / name).read_text(encoding="utf-8") for name in names] == list(names)


def test_k32_a_directory_is_moved_whole_where_none_is(root: Path, tmp_path: Path) -> None:
    staged = staged_evaluation(tmp_path)
    before, inode = contents(staged), staged.stat().st_ino
    root.mkdir()
    move_into(staged, root / "target")
    assert (contents(root / "target"), (root / "target").stat().st_ino) == (before, inode)
