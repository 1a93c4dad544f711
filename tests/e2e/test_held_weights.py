"""Better weights for which there is no time to save: held, written with the next checkpoint, the same in the end."""

from __future__ import annotations

from pathlib import Path

import pytest

import lora_llava.training.checkpoints.saver as resumable
from lora_llava.artifact import read_manifest
from lora_llava.formats.names import WEIGHTS
from lora_llava.system.files import file_sha256
from lora_llava.training.checkpoints.files import read_verified
from lora_llava.training.checkpoints.held import HeldWeights
from tests.helpers.resuming import Stopped, at_step, log_of, stop, train, write_project

EACH_STEP = (
    "stages.align=null", "stages.instruct.eval_steps=1", "stages.instruct.save_steps=4",
    "stages.instruct.num_sample_answers=0", "stages.instruct.learning_rate=0.07", "adapter.lora_dropout=0",
    "stages.instruct.lr_scheduler_type=constant",
)  # fmt: skip
"""10 steps with a validation after each; the rate is so high that the best is step 7, and others were better before."""


@pytest.fixture(scope="module")
def recipe(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("held"), tiny_base)


@pytest.fixture(scope="module")
def saved(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with time for every checkpoint."""
    directory = tmp_path_factory.mktemp("saved") / "run"
    train(recipe, directory, *EACH_STEP)
    return directory


def best_step(run: Path) -> int:
    losses = {row["step"]: row["eval_loss"] for row in log_of(run) if "eval_loss" in row}
    return min(losses, key=lambda step: losses[step])


def assert_same_best(run: Path, saved: Path) -> None:
    """The artifact is the same, and the checkpoint of the best holds weights, but no state of the training."""
    step = best_step(saved)
    assert step == best_step(run)
    assert file_sha256(run / "instruct" / WEIGHTS) == file_sha256(saved / "instruct" / WEIGHTS)
    checkpoint = run / f"checkpoints/instruct/step-{step}"
    assert file_sha256(checkpoint / WEIGHTS) == file_sha256(run / "instruct" / WEIGHTS)
    assert read_manifest(checkpoint).seen["steps"] == step
    assert log_of(run) == log_of(saved)


def test_k31_better_weights_are_saved_at_once_without_the_optimizer(saved: Path) -> None:
    step = best_step(saved)
    assert 4 < step < 8
    best = saved / f"checkpoints/instruct/step-{step}"
    assert not read_verified(best).resumable
    assert not list(best.glob("optimizer*"))
    assert file_sha256(best / WEIGHTS) == file_sha256(saved / "instruct" / WEIGHTS)


def test_k31_weights_without_time_to_save_are_held_and_are_the_same(recipe: Path, saved: Path, tmp_path: Path) -> None:
    summary, _ = train(recipe, tmp_path / "run", *EACH_STEP, best_share=-1.0)
    assert_same_best(tmp_path / "run", saved)
    best = tmp_path / f"run/checkpoints/instruct/step-{best_step(saved)}"
    assert not read_verified(best).resumable
    assert not list(best.glob("optimizer*"))
    # The first better validation; then steps 4 and 8 and the last, each with the best before it: no more, however often
    # the loss was the lowest.
    assert summary["instruct"]["checkpoints_saved"] <= 7
    assert read_verified(tmp_path / "run/checkpoints/instruct/step-10").resumable


@pytest.mark.parametrize("step", [3, 6, 10])
def test_k31_a_kill_between_holding_and_writing_changes_nothing(
    recipe: Path, saved: Path, tmp_path: Path, step: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, "instruct", step, stop)
        with pytest.raises(Stopped):
            train(recipe, tmp_path / "run", *EACH_STEP, best_share=-1.0)
    train(recipe, tmp_path / "run", *EACH_STEP, resume="exact", best_share=-1.0)
    assert_same_best(tmp_path / "run", saved)


def test_k31_a_run_continues_from_a_checkpoint_with_an_optimizer(recipe: Path, saved: Path, tmp_path: Path) -> None:
    # Killed when the held weights are on the disk and the checkpoint of their time is not.
    original, calls = resumable.CheckpointSaver._write_weights, []

    def write_and_stop(self: resumable.CheckpointSaver, held: HeldWeights) -> None:
        original(self, held)
        if not calls:
            calls.append(held.progress.step)
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resumable.CheckpointSaver, "_write_weights", write_and_stop)
        with pytest.raises(Stopped):
            train(recipe, tmp_path / "run", *EACH_STEP, best_share=-1.0)
    assert calls
    # Another save_steps would remove what is of a later step than the one saved: the best is measured again.
    train(recipe, tmp_path / "run", *EACH_STEP, "stages.instruct.save_steps=1", resume="exact", best_share=-1.0)
    assert file_sha256(tmp_path / "run/instruct" / WEIGHTS) == file_sha256(saved / "instruct" / WEIGHTS)
