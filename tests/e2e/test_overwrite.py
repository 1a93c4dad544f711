"""A run that replaces another, or starts anew: until its first checkpoint is whole, nothing is lost by a failure."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

import lora_llava.training.run as run_module
import lora_llava.training.train as train_module
from lora_llava.artifact import base_location, load_artifact, merged_manifest
from lora_llava.cli import cli
from lora_llava.modeling.base import BaseIdentity
from lora_llava.recipe.file import load_recipe
from lora_llava.training.checkpoints import files as checkpoint
from lora_llava.training.checkpoints import saver as resumable
from lora_llava.training.checkpoints import state
from lora_llava.training.run import run_recipe
from lora_llava.training.trainer import PackedTrainer
from tests.helpers.claiming import Stopped, contents
from tests.helpers.runs import write_data, write_recipe

FEW = ("stages.instruct.max_steps=1", "stages.instruct.num_sample_answers=0", "stages.instruct.data.validation=null")
STEPS = [(run_module, "prepare_base")] + [
    (train_module, name)
    for name in (
        "read_records", "plan_memory", "plan_records", "run_facts", "load_base", "build_stage",
        "make_trainer", "check_first_row", "StageArtifact", "CheckpointSaver",
    )
] + [
    (PackedTrainer, "training_step"), (PackedTrainer, "create_optimizer"), (resumable, "write_checkpoint"),
    (state.HeldState, "write"), (checkpoint, "file_sha256"), (resumable, "place"),
]  # fmt: skip
"""What a run calls from its claim to its first checkpoint, in about that order."""


@pytest.fixture(scope="module")
def project(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("overwrite")
    write_data(directory)
    return write_recipe(directory, {"model_name_or_path": str(tiny_base)}, ["instruct"])


@pytest.fixture(scope="module")
def old(project: Path) -> Path:
    """A finished run, with something of the user's in it."""
    root = project.parent / "run"
    finetune(project, root)
    (root / "instruct/notes.txt").write_text("mine", encoding="utf-8")
    return root


def finetune(project: Path, root: Path, *overrides: str, overwrite: bool = False) -> None:
    recipe = load_recipe(project, [*FEW, f"output_dir={root}", *overrides])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "plot_loss", lambda *_: None)
        run_recipe(recipe, Console(file=io.StringIO()), overwrite=overwrite)


@pytest.mark.parametrize(("where", "name"), STEPS, ids=[name for _, name in STEPS])
def test_k1_k4_a_fault_at_any_step_leaves_the_earlier_run_usable(
    project: Path, old: Path, tmp_path: Path, where: object, name: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise Stopped

    before = contents(old, kits=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, fail)
        for root, overwrite in ((old, True), (tmp_path / "new", False)):
            with pytest.raises(Stopped):
                finetune(project, root, overwrite=overwrite)
    assert contents(old, kits=True) == before
    assert not (tmp_path / "new").exists()
    load_artifact(old / "instruct", device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stages.instruct.data.image_root=typo"], "typo"),
        (["stages.instruct.data.path=typo.json"], "typo.json"),
        (["base.model_name_or_path=./typo"], "typo"),
        (["report_to=[clearml]"], "clearml"),
        (["start_from=./typo"], "typo"),
        (["start_from={run}/instruct"], "is in output_dir, where --overwrite would replace it"),
        (["stages.instruct.data.path={run}/instruct/notes.json"], "is in output_dir"),
    ],
)
def test_k1_k2_a_mistake_in_the_command_costs_nothing(
    project: Path, old: Path, overrides: list[str], words: str
) -> None:
    before = contents(old, kits=True)
    (old / "instruct/notes.json").write_text("[]", encoding="utf-8")
    settings = [one.format(run=old) for one in [*FEW, f"output_dir={old}", *overrides]]
    done = CliRunner().invoke(cli, ["finetune", str(project), *settings, "--overwrite"])
    (old / "instruct/notes.json").unlink()
    assert done.exit_code not in (0, None)
    assert words in done.output
    assert "Traceback" not in done.output
    assert contents(old, kits=True) == before


def test_k1_k3_a_run_that_succeeds_replaces_the_earlier_one_and_keeps_what_is_the_user_s(
    project: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    finetune(project, root)
    (root / "instruct/notes.txt").write_text("mine", encoding="utf-8")
    finetune(project, root, "seed=7", "stages.instruct.max_steps=2", overwrite=True)
    assert (root / "instruct/notes.txt").read_text(encoding="utf-8") == "mine"
    assert [one.name for one in (root / "checkpoints/instruct").iterdir()] == ["step-2"]
    load_artifact(root / "instruct", device=torch.device("cpu"), dtype=torch.float32)
    finetune(project, root, overwrite=True)


def test_k42_k43_merge_and_export_leave_what_is_beside_their_output(project: Path, old: Path, tmp_path: Path) -> None:
    for name in ("merged.partial/a", "hf.partial/b", "c.removed", ".lock", "evaluation/d", "base/e"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "c.removed")
    before, run = contents(tmp_path), contents(old, kits=True)
    for command in (
        ["merge", str(old / "instruct"), str(tmp_path / "merged")],
        ["export", str(tmp_path / "merged"), str(tmp_path / "hf"), "--format", "hf"],
        ["merge", str(old / "instruct"), str(tmp_path / "merged")],
    ):
        done = CliRunner().invoke(cli, command)
        after = contents(tmp_path)
        assert {name: after.get(name) for name in before} == before, command
    assert done.exit_code != 0
    assert "already exists" in done.output
    assert merged_manifest(tmp_path / "merged") is not None
    assert contents(old, kits=True) == run


def test_k43_an_artifact_below_a_link_finds_its_base(tmp_path: Path, tiny_base: Path) -> None:
    # On another disk, deeper than the link: `..` leads where the file system says.
    disk = tmp_path / "disk" / "a" / "b"
    disk.mkdir(parents=True)
    (tmp_path / "linked").symlink_to(disk)
    identity = BaseIdentity("tiny", None, "0" * 64)
    location = base_location(identity, tiny_base, tmp_path / "linked" / "instruct")
    (disk / "instruct").mkdir()
    assert (tmp_path / "linked" / "instruct" / location["path"]).samefile(tiny_base)
