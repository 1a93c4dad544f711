"""The directory of a run: what a run finds there stays whole, whatever happens before its first checkpoint."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path

import pytest

from lora_llava.errors import LoraLlavaError, TrainingError
from lora_llava.recipe.settings import Recipe
from lora_llava.run_directory import output
from lora_llava.run_directory.claim import _MANIFESTS, claimed, restore, restore_around
from lora_llava.run_directory.lock import LOCK, locked
from lora_llava.run_directory.problems import problems_of_output_dir
from lora_llava.run_directory.written import EXCHANGE, NEW, STATE
from lora_llava.system.files import STAGING
from tests.helpers.claiming import Stopped, a_recipe, contents, die, forked, run, stop_at
from tests.helpers.disk import Disk, full, read_only


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return a_recipe(tmp_path / "run")


def calls_until_the_first_checkpoint(recipe: Recipe, *, overwrite: bool) -> tuple[list[int], int]:
    """List the calls to the disk at which to fail, and count those until the first checkpoint is whole.

    Before the exchange of the runs every fourth, which are of each kind; then the first and the last of each series of
    calls of one kind.
    """
    counting = Disk(recipe.resolved_output_dir)
    counts: list[int] = []

    def moment(name: str) -> None:
        if name == "saved 1":
            counts.append(len(counting.calls))
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        counting.install(patch)
        with pytest.raises(Stopped):
            run(recipe, "counted", moment, overwrite=overwrite)
    count = counts[0]
    begins = next(number for number, call in enumerate(counting.calls) if EXCHANGE in call[1])
    series = [list(calls) for _, calls in groupby(range(begins, count), lambda number: kind(*counting.calls[number]))]
    ends = [number for calls in series for number in dict.fromkeys((calls[0], calls[-1]))]
    return [*range(0, begins, 4), *ends], count


def kind(name: str, path: str) -> tuple[object, ...]:
    """Tell what a call of the exchange does: files leave and come in turn, manifests first or last."""
    if name not in ("rename", "unlink"):
        return (name,)
    return name, STAGING in path or f"/{STATE}/{NEW}/" in path, Path(path).name in _MANIFESTS


def files(root: Path) -> dict[str, str]:
    """List files and links with what they hold; a disk that failed at last may keep an empty directory."""
    return {name: value for name, value in contents(root).items() if value}


@pytest.mark.parametrize("moment", ["started", "step 1"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_k1_k4_an_error_before_the_first_checkpoint_leaves_the_directory_as_it_was(
    recipe: Recipe, moment: str, overwrite: bool
) -> None:
    root = recipe.resolved_output_dir
    if overwrite:
        run(recipe, "old")
        (root / "instruct/notes.txt").write_text("mine", encoding="utf-8")
    before = contents(root, kits=True)
    with pytest.raises(Stopped):
        run(recipe, "new", stop_at(moment), overwrite=overwrite)
    assert contents(root, kits=True) == before
    assert root.exists() == overwrite
    # The corrected command just works.
    run(recipe, "new", overwrite=overwrite)
    assert json.loads((root / "summary.json").read_text(encoding="utf-8"))["seed"] == "new"
    assert (root / "instruct/notes.txt").exists() == overwrite


def test_k1_the_earlier_run_is_used_until_the_first_checkpoint_and_gone_after_it(recipe: Recipe) -> None:
    root = recipe.resolved_output_dir
    run(recipe, "old", steps=2)
    before = contents(root)

    def look(moment: str) -> None:
        if moment in ("started", "step 1"):
            assert contents(root) == before
        elif moment == "saved 1":
            seen = contents(root)
            assert not {
                name for name in seen if name.startswith(("instruct", "evaluation", "checkpoints/instruct/step-2"))
            }
            assert not list(root.rglob(f"{STAGING}*"))
            assert json.loads((root / "summary.json").read_text(encoding="utf-8")) == {"seed": "new"}

    run(recipe, "new", look, overwrite=True)
    # The two recipes are the same.
    assert [name for name, digest in files(root).items() if before.get(name) == digest] == ["recipe.yaml"]


@pytest.mark.parametrize("act", [full, read_only])
@pytest.mark.parametrize("overwrite", [False, True])
def test_k1_a_disk_that_fails_at_any_call_leaves_the_earlier_run(
    recipe: Recipe, tmp_path: Path, overwrite: bool, act: Callable[[str, str], None]
) -> None:
    root, kept = recipe.resolved_output_dir, tmp_path / "kept"
    kept.mkdir()
    if overwrite:
        run(recipe, "old")
        (root / "instruct/notes.txt").write_text("mine", encoding="utf-8")
        shutil.copytree(root, kept, dirs_exist_ok=True, symlinks=True)
    calls, count = calls_until_the_first_checkpoint(recipe, overwrite=overwrite)
    for first in calls:
        shutil.rmtree(root)
        if overwrite:
            shutil.copytree(kept, root, symlinks=True)
        before, failed = files(root), False
        with pytest.MonkeyPatch.context() as patch:
            Disk(root, act, first).install(patch)
            try:
                run(recipe, "new", stop_at("saved 1"), overwrite=overwrite)
            except (OSError, LoraLlavaError):
                failed = True
            except Stopped:
                pass
        root.mkdir(exist_ok=True)
        restore(root)
        after = files(root)
        if failed and after != before:
            # The exchange was done: only what went aside could not be removed.
            assert json.loads((root / "summary.json").read_text(encoding="utf-8")) == {"seed": "new"}, first
            assert (root / "checkpoints/instruct/step-1/checkpoint.json").is_file()
            assert first > count // 2
        if overwrite:
            assert (root / "instruct/notes.txt").read_text(encoding="utf-8") == "mine"


def killed_at(recipe: Recipe, first: int, overwrite: bool) -> None:
    """Run until a call to the disk, and die there."""
    Disk(recipe.resolved_output_dir, die, first).install(pytest.MonkeyPatch())
    run(recipe, "new", overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_k1_k4_a_kill_at_any_call_leaves_the_earlier_run_or_the_new_one_whole(
    recipe: Recipe, tmp_path: Path, overwrite: bool
) -> None:
    root, kept = recipe.resolved_output_dir, tmp_path / "kept"
    kept.mkdir()
    if overwrite:
        run(recipe, "old")
        (root / "instruct/notes.txt").write_text("mine", encoding="utf-8")
        shutil.copytree(root, kept, dirs_exist_ok=True)
    calls, count = calls_until_the_first_checkpoint(recipe, overwrite=overwrite)
    ended_new: list[bool] = []
    for first in calls:
        shutil.rmtree(root, ignore_errors=True)
        if overwrite:
            shutil.copytree(kept, root)
        before = files(root)

        assert forked(partial(killed_at, recipe, first, overwrite)) == -signal.SIGKILL
        # The preflight sees nothing that keeps the same command out.
        assert not (overwrite and problems_of_output_dir(recipe.resolved_output_dir, recipe.plain(), overwrite=True))
        # What a command does first that reads the artifact, and then one that trains.
        restore_around(root / "instruct")
        if files(root).keys() >= before.keys() - {"train_log.jsonl"} and overwrite:
            assert {name: files(root)[name] for name in before if name.startswith("instruct/")} == {
                name: value for name, value in before.items() if name.startswith("instruct/")
            }
        with locked(root):
            restore(root)
        after = files(root)
        if any(name.startswith("checkpoints/instruct/step-1/") for name in after) and after != before:
            ended_new.append(True)
            names = {
                "config.json",
                "recipe.yaml",
                "summary.json",
                "skipped.jsonl",
                "train_log.jsonl",
                "checkpoint.json",
            }
            assert names <= {Path(name).name for name in after}
            assert problems_of_output_dir(recipe.resolved_output_dir, recipe.plain(), resume=True) == []
        else:
            ended_new.append(False)
            assert after == before, first
    # One call decides: before it the earlier run stays, after it the new one has come.
    assert ended_new == sorted(ended_new)
    assert set(ended_new) == {False, True}
    assert calls[ended_new.index(True)] > count // 2
    run(recipe, "last", overwrite=(root / "recipe.yaml").exists())
    assert json.loads((root / "summary.json").read_text(encoding="utf-8"))["seed"] == "last"


def said(recipe: Recipe, **how: bool) -> str:
    return "\n".join(
        " ".join(problem) for problem in problems_of_output_dir(recipe.resolved_output_dir, recipe.plain(), **how)
    )


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("key", ["start_from", "base", "data", "image_root", "validation", "evaluation"])
def test_k2_an_input_that_would_be_replaced_is_refused_by_name(tmp_path: Path, key: str, overwrite: bool) -> None:
    root = tmp_path / "run"
    run(a_recipe(root), "old")
    data = {"path": str(tmp_path / "train.json"), "image_root": None, "validation": None}
    inside = {
        "start_from": (("start_from",), root / "instruct"),
        "base": (("base", "model_name_or_path"), root / "base"),
        "data": (("stages", "instruct", "data", "path"), root / "instruct/mine.json"),
        "image_root": (("stages", "instruct", "data", "image_root"), root / "evaluation"),
        "validation": (("stages", "instruct", "data", "validation", "path"), root / "align/v.json"),
        "evaluation": (("evaluation", "data", "path"), root / "evaluation/mine.json"),
    }
    names, path = inside[key]
    if path.suffix:
        path.parent.mkdir(exist_ok=True)
        path.write_text("[]", encoding="utf-8")
    settings: dict[str, object] = {
        "stages": {"instruct": {"data": data, "tokens_per_micro_batch": 4096}},
        "base": {"model_name_or_path": str(tmp_path)},
        "evaluation": {"data": {"path": str(tmp_path / "test.json")}},
    }
    holder = settings
    for name in names[:-1]:
        holder[name] = holder.get(name) or {}
        holder = holder[name]  # type: ignore[assignment]
    holder[names[-1]] = path if key == "start_from" else str(path)
    recipe = a_recipe(root, **settings)
    before = contents(root, kits=True)
    shown = said(recipe, overwrite=overwrite)
    assert ".".join(names) in shown and str(path) in shown
    if not overwrite:
        assert "--overwrite replaces" not in shown
    with (
        pytest.raises(TrainingError, match="output_dir"),
        claimed(recipe.resolved_output_dir, recipe.plain(), overwrite=overwrite),
    ):
        pytest.fail("claimed")
    assert contents(root, kits=True) == before


def test_a_process_does_not_lock_a_directory_again(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        with pytest.raises(TrainingError, match="in use by another run of this process"), locked(tmp_path / "run"):
            pytest.fail("locked again")
        assert (tmp_path / "run" / LOCK).exists(), "still locked"
    with locked(tmp_path / "run"):
        pass


def test_k2_an_input_among_several_is_refused_by_its_key(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run(a_recipe(root), "old")
    mine = root / "instruct/mine.json"
    mine.write_text("[]", encoding="utf-8")
    outside = {"path": str(tmp_path / "train.json"), "image_roots": [str(tmp_path)]}
    for data, key in (
        ([outside, {"path": str(mine)}], "data.1.path"),
        ([{"path": str(mine)}, outside], "data.path"),
        ({**outside, "image_roots": [str(tmp_path), str(mine.parent)]}, "data.image_roots.1"),
    ):
        shown = said(a_recipe(root, stages={"instruct": {"data": data}}), overwrite=True)
        assert f"stages.instruct.{key}" in shown
        assert "where --overwrite would replace it" in shown
    assert said(a_recipe(root, stages={"instruct": {"data": [outside, outside]}}), overwrite=True) == ""


def test_k2_an_input_is_known_through_a_link_and_one_beside_the_run_is_no_problem(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run(a_recipe(root), "old")
    (tmp_path / "link").symlink_to(root / "instruct")
    assert "start_from" in said(a_recipe(root, start_from=tmp_path / "link"), overwrite=True)
    (root / "check").mkdir()
    (root / "check/train.jsonl").write_text("", encoding="utf-8")
    data = {"path": "./train.json", "exclude": str(root / "check/train.jsonl")}
    stages = {"instruct": {"data": data, "tokens_per_micro_batch": 4096}}
    assert said(a_recipe(root, stages=stages), overwrite=True) == ""


@pytest.mark.parametrize("name", ["base", "evaluation", "checkpoints", "align", "instruct", "checkpoints/instruct"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_k3_a_directory_of_the_user_is_refused_by_name_and_stays(recipe: Recipe, name: str, overwrite: bool) -> None:
    root = recipe.resolved_output_dir
    (root / name).mkdir(parents=True)
    (root / name / "model.safetensors").write_text("mine", encoding="utf-8")
    before = contents(root, kits=True)
    with pytest.raises(TrainingError, match=rf"holds {name}/, which no run of the kit wrote. Give another"):
        run(recipe, "new", overwrite=overwrite)
    assert contents(root, kits=True) == before


def test_k3_files_of_the_user_in_a_run_stay_where_they_are(recipe: Recipe) -> None:
    root = recipe.resolved_output_dir
    run(recipe, "old")
    mine = ("notes.txt", "instruct/README.md", "checkpoints/instruct/step-3/notes.txt", "base/sub/mine", "features/f")
    for name in mine:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("mine", encoding="utf-8")
    (root / "instruct/link").symlink_to("README.md")
    run(recipe, "new", overwrite=True, steps=5)
    assert [(root / name).read_text(encoding="utf-8") for name in mine] == ["mine"] * len(mine)
    assert (root / "instruct/link").readlink() == Path("README.md")
    assert "new" in (root / "instruct/adapter_model.safetensors").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["recipe.yaml", "train_log.jsonl", "instruct/adapter_model.safetensors"])
def test_k3_a_file_that_was_changed_since_is_not_the_run_s_any_more(recipe: Recipe, name: str) -> None:
    root = recipe.resolved_output_dir
    run(recipe, "old")
    with (root / name).open("a", encoding="utf-8") as file:
        file.write("# mine\n")
    before = contents(root, kits=True)
    with pytest.raises(TrainingError, match=rf"{name} was changed since the run wrote it"):
        run(recipe, "new", overwrite=True)
    assert contents(root, kits=True) == before


def test_k3_a_run_without_a_list_continues_but_is_not_overwritten(recipe: Recipe) -> None:
    root = recipe.resolved_output_dir
    run(recipe, "old")
    shutil.rmtree(root / STATE)
    with pytest.raises(TrainingError, match=r"no list of what a run wrote .* Move it away: mv .*run .*run\.old"):
        run(recipe, "new", overwrite=True)
    with pytest.raises(TrainingError, match=r"holds a run already .*--resume continues it") as error:
        run(recipe, "new")
    assert "--overwrite" not in str(error.value)
    with claimed(recipe.resolved_output_dir, recipe.plain(), resume=True):
        output.write_summary(root, {"resumed": True})
    assert output.read_summary(root) == {"resumed": True}


def test_k3_a_run_that_was_copied_or_moved_is_known_by_its_content(recipe: Recipe, tmp_path: Path) -> None:
    run(recipe, "old")
    copied = a_recipe(tmp_path / "copied")
    # Times and inodes are others.
    shutil.copytree(recipe.resolved_output_dir, tmp_path / "copied", copy_function=shutil.copy)
    run(copied, "new", overwrite=True)
    assert output.read_summary(tmp_path / "copied")["seed"] == "new"


def test_k4_to_resume_a_run_whose_recipe_is_gone_names_the_file(recipe: Recipe) -> None:
    run(recipe, "new")
    (recipe.resolved_output_dir / "recipe.yaml").unlink()
    [problem] = problems_of_output_dir(recipe.resolved_output_dir, recipe.plain(), resume=True)
    assert "holds checkpoints but no recipe.yaml" in problem.what
    assert problem.fix.startswith("Put the file back")


@pytest.mark.parametrize("directory", ["/proc/x", "/sys/x/y", "/proc"])
def test_k4_a_directory_of_the_kernel_is_refused(recipe: Recipe, directory: str) -> None:
    [problem] = problems_of_output_dir(Path(directory), recipe.plain())
    assert "is a view of the kernel" in problem.what


def test_k4_to_resume_a_run_without_a_checkpoint_says_what_to_do(recipe: Recipe) -> None:
    root = recipe.resolved_output_dir

    def work() -> None:
        run(recipe, "new", lambda name: die("", "") if name == "step 1" else None)

    assert forked(work) == -signal.SIGKILL
    assert root.exists()
    words = r"no run in it reached its first checkpoint. Leave --resume out"
    with pytest.raises(TrainingError, match=words), claimed(recipe.resolved_output_dir, recipe.plain(), resume=True):
        pytest.fail("there is nothing to resume")
    run(recipe, "new")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("inside", ["run/instruct", "run/checkpoints/instruct/step-1", "run/instruct/more"])
def test_k2_a_run_does_not_write_into_an_artifact_or_a_checkpoint(
    recipe: Recipe, tmp_path: Path, inside: str, resume: bool
) -> None:
    for name in ("run/instruct", "run/checkpoints/instruct/step-1"):
        (tmp_path / name).mkdir(parents=True)
        for file in ("manifest.json", "adapter_config.json", "recipe.yaml"):
            (tmp_path / name / file).write_text("{}", encoding="utf-8")
    [problem] = problems_of_output_dir(tmp_path / inside, recipe.plain(), resume=resume)
    assert "is in the artifact or checkpoint" in problem.what
