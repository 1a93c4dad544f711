"""Files of the user near those of the kit: never removed by their name, never written through a link."""

from __future__ import annotations

import io
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from rich.console import Console

from lora_llava.cli import cli
from lora_llava.doctor.report import Report, write_report
from lora_llava.errors import ArtifactError, DataError, TrainingError
from lora_llava.quickstart.run import place_recipe
from lora_llava.recipe.file import bundled_recipes
from lora_llava.recipe.settings import Recipe
from lora_llava.run_directory.lock import LOCK
from lora_llava.run_directory.written import STATE
from lora_llava.system import files as system_files
from lora_llava.system.files import STAGING, clear_stale, refuse_existing, staged, staging_in
from tests.helpers.claiming import Stopped, a_recipe, contents, die, forked, run, stop_at


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is flushed shows after a power cut alone, and takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return a_recipe(tmp_path / "run")


def test_k42_k43_a_folder_of_the_user_is_what_it_was_after_everything(tmp_path: Path) -> None:
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "mine"
    elsewhere.mkdir()
    (elsewhere / "secret.txt").write_text("mine", encoding="utf-8")
    root.mkdir()
    for name in (
        "paper.partial",
        "data.removed",
        ".lock",
        "base.partial/x",
        "out.partial/x",
        "step-1.removed/y",
        ".writable",
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("mine", encoding="utf-8")
    (root / ".lora-llava-mine").mkdir()
    (root / ".lora-llava-mine/notes.txt").write_text("mine", encoding="utf-8")
    (root / "link").symlink_to(elsewhere / "secret.txt")
    (root / "dangling").symlink_to(elsewhere / "not there")
    before, outside = contents(root, kits=True), contents(elsewhere)
    recipe = a_recipe(root)

    def mine() -> dict[str, str]:
        found = contents(root, kits=True)
        return {name: found.get(name, "gone") for name in before}

    with pytest.raises(Stopped):
        run(recipe, "failed", stop_at("step 1"))
    assert contents(root, kits=True) == before
    run(recipe, "first")
    assert mine() == before
    with pytest.raises(TrainingError, match="holds a run already"):
        run(recipe, "refused")
    run(recipe, "second", overwrite=True)
    with staged(root / "out") as staging:
        (staging / "model").write_text("merged", encoding="utf-8")
    assert mine() == before
    assert contents(elsewhere) == outside


@pytest.mark.parametrize(
    "name", [LOCK, "recipe.yaml", "train_log.jsonl", "loss.png", "summary.json", "skipped.jsonl", STATE]
)
def test_k43_nothing_is_written_through_a_link(recipe: Recipe, tmp_path: Path, name: str) -> None:
    root, target = recipe.resolved_output_dir, tmp_path / "target"
    root.mkdir()
    target.write_text("mine", encoding="utf-8")
    (root / name).symlink_to(target)
    for overwrite in (False, True):
        with pytest.raises(TrainingError, match=name.replace(".", r"\.")):
            run(recipe, "new", overwrite=overwrite)
    assert target.read_text(encoding="utf-8") == "mine"
    assert contents(root, kits=True) == {name: f"-> {target}"}


def test_k43_a_lock_of_another_tool_stays(recipe: Recipe) -> None:
    root = recipe.resolved_output_dir
    root.mkdir()
    (root / LOCK).write_text("held by a scheduler", encoding="utf-8")
    with pytest.raises(TrainingError, match="is not a lock of the kit"):
        run(recipe, "new")
    assert (root / LOCK).read_text(encoding="utf-8") == "held by a scheduler"


def test_k43_links_that_the_user_made_to_another_disk_work_and_stay(tmp_path: Path) -> None:
    disks = {name: tmp_path / "disk" / name.replace("/", "-") for name in ("checkpoints", "instruct", "base", "run")}
    for disk in disks.values():
        disk.mkdir(parents=True)
    (disks["checkpoints"] / "thesis.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "run").symlink_to(disks["run"])
    for name in ("checkpoints", "instruct", "base"):
        (tmp_path / "run" / name).symlink_to(disks[name])
    recipe = a_recipe(tmp_path / "run")
    for seed, overwrite in (("first", False), ("second", True), ("third", True)):
        with pytest.raises(Stopped):
            run(recipe, "failed", stop_at("step 1"), overwrite=overwrite)
        run(recipe, seed, overwrite=overwrite)
        assert (disks["instruct"] / "adapter_model.safetensors").read_text(encoding="utf-8") == seed * 100
        assert (disks["base"] / "config.json").read_text(encoding="utf-8") == seed
        assert sorted(one.name for one in (disks["checkpoints"] / "instruct").iterdir()) == ["step-2", "step-3"]
    assert (tmp_path / "run").is_symlink()
    assert all((tmp_path / "run" / name).is_symlink() for name in ("checkpoints", "instruct", "base"))
    assert (disks["checkpoints"] / "thesis.txt").read_text(encoding="utf-8") == "mine"
    assert not list((tmp_path / "disk").rglob(f"{STAGING}*"))


def test_k43_a_link_to_a_disk_that_is_not_there_is_named(recipe: Recipe, tmp_path: Path) -> None:
    recipe.resolved_output_dir.mkdir()
    (recipe.resolved_output_dir / "checkpoints").symlink_to(tmp_path / "unplugged")
    with pytest.raises(TrainingError, match=r"checkpoints is a link to .*unplugged, which does not exist"):
        run(recipe, "new")


def test_k42_only_what_a_killed_process_of_the_kit_claimed_is_cleared(tmp_path: Path) -> None:
    def work() -> None:
        with staged(tmp_path / "out") as staging:
            (staging / "half").write_text("half", encoding="utf-8")
            die("", "")

    assert forked(work) == -signal.SIGKILL
    [left] = tmp_path.iterdir()
    shutil.copytree(left, tmp_path / ".lora-llava-copied")
    with staged(tmp_path / "out"):
        pass
    # A copy of it has another inode, so that it is somebody's.
    assert sorted(one.name for one in tmp_path.iterdir()) == [".lora-llava-copied", "out"]


def test_k42_k43_check_replaces_its_own_report_alone(tmp_path: Path) -> None:
    survey = SimpleNamespace(sources=[], recipe=SimpleNamespace(name="tiny"))
    report = Report(survey, SimpleNamespace(missing=[], sides=[], plans=[], mixes=[]), {}, {}, 0.0)  # type: ignore[arg-type]
    mine = ("check.json.partial", "check.html.partial", "notes.txt")
    for name in mine:
        (tmp_path / name).write_text("mine", encoding="utf-8")
    for page in ("first", "second"):
        write_report(report, page, tmp_path)
        assert (tmp_path / "check.html").read_text(encoding="utf-8") == page
    assert [(tmp_path / name).read_text(encoding="utf-8") for name in mine] == ["mine"] * 3
    for name in ("check.html", "check.json"):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text("mine", encoding="utf-8")
        with pytest.raises(DataError, match=rf"{name} was not written by lora-llava check, or was changed"):
            write_report(report, "third", tmp_path)
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to(tmp_path / "notes.txt")
        with pytest.raises(DataError, match=name):
            write_report(report, "third", tmp_path)
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(before)
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_k43_recipes_are_not_copied_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    name = next(iter(bundled_recipes()))
    done = CliRunner().invoke(cli, ["recipes", "copy", name, "--to", str(tmp_path / "mine.yaml")])
    assert done.exit_code != 0
    assert not (tmp_path / "elsewhere.yaml").exists()


def test_k43_an_edited_recipe_of_the_quickstart_is_never_lost(tmp_path: Path) -> None:
    source, console = bundled_recipes()["quickstart"], Console(file=io.StringIO())
    for content in ("first", "second", "third"):
        place_recipe(source, tmp_path, console)
        (tmp_path / source.name).write_text(content, encoding="utf-8")
    (tmp_path / source.name).unlink()
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    (tmp_path / source.name).symlink_to(tmp_path / "mine")
    place_recipe(source, tmp_path, console)
    texts = [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()]
    assert {"first", "second", "mine"} <= set(texts)
    assert (tmp_path / source.name).read_text(encoding="utf-8") == source.read_text(encoding="utf-8")


def test_k42_a_name_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"picture\.png is not a directory; give another name"):
        refuse_existing(tmp_path / "picture.png" / "merged")


def test_k42_what_a_kill_leaves_of_a_staging_directory_is_known_to_its_end(tmp_path: Path) -> None:
    # Killed before its claim was written, or after it was removed: empty, and not new any more.
    for name, age in (("old", 3600), ("new", 0)):
        (tmp_path / f"{STAGING}{name}").mkdir()
        os.utime(tmp_path / f"{STAGING}{name}", (time.time() - age,) * 2)
    # Of somebody else, whatever its name.
    (tmp_path / f"{STAGING}full").mkdir()
    (tmp_path / f"{STAGING}full" / "notes.txt").write_text("mine", encoding="utf-8")
    os.utime(tmp_path / f"{STAGING}full", (0, 0))
    clear_stale(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{STAGING}full", f"{STAGING}new"]


def test_k42_the_claim_of_a_staging_directory_goes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = []
    with staging_in(tmp_path) as directory:
        for name in ("a.bin", "z.bin"):
            (directory / name).write_bytes(b"x")
        unlink = Path.unlink

        def watched(self: Path, missing_ok: bool = False) -> None:
            unlink(self, missing_ok)
            left.append(sorted(path.name for path in directory.iterdir()))

        monkeypatch.setattr(Path, "unlink", watched)
    assert len(left) == 2
    assert all("claim.json" in names for names in left)


def test_staging_directories_on_two_disks_may_have_one_inode_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = Path.stat

    def on_two_disks(path: Path, **how: bool) -> os.stat_result:
        status = stat(path, **how)
        if not path.name.startswith(STAGING):
            return status
        return os.stat_result((status.st_mode, 7, int(path.parent.name), *status[3:]))

    monkeypatch.setattr(Path, "stat", on_two_disks)
    for disk in ("1", "2"):
        (tmp_path / disk).mkdir()
    with staging_in(tmp_path / "1"):
        with staging_in(tmp_path / "2"):
            assert system_files._in_use == {(1, 7), (2, 7)}
        assert system_files._in_use == {(1, 7)}, "still in use: not removed as stale"
