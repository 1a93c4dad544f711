"""The guards of a whole run: what they log and say, what they stop, and that looking changes nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import lora_llava.training.train as train_module
from lora_llava.artifact import read_manifest
from lora_llava.data.record import Record
from lora_llava.data.rows import ImageTransform
from lora_llava.errors import TrainingError
from lora_llava.formats.names import WEIGHTS
from lora_llava.recipe.file import load_recipe
from lora_llava.system.files import file_sha256
from lora_llava.training.run import run_recipe
from lora_llava.training.trainer import PackedTrainer
from tests.helpers.resuming import log_of
from tests.helpers.runs import Run, watched_run, write_data, write_recipe

SIX_STEPS = ("stages.instruct.max_steps=6", "stages.instruct.eval_steps=2")
FIGURES = {"grad_norm_lora", "grad_norm_projector", "projector_norm", "projector_change", "supervised_share"}


@pytest.fixture(scope="module")
def recipe_file(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("guards")
    write_data(directory)
    return write_recipe(directory, {"model_name_or_path": str(tiny_base)})


@pytest.fixture(scope="module")
def instruct_file(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("instruct")
    write_data(directory)
    return write_recipe(directory, {"model_name_or_path": str(tiny_base)}, ["instruct"])


@pytest.fixture(scope="module")
def run(instruct_file: Path) -> Run:
    return watched_run(instruct_file, *SIX_STEPS, "adapter.lora_dropout=0.1")


def test_figures_are_in_every_line_of_the_log(run: Run) -> None:
    rows = [row for row in run.log if "loss" in row]
    assert len(rows) == 6
    for row in rows:
        assert row.keys() >= FIGURES
        assert all(math.isfinite(row[name]) for name in FIGURES)
    seen = run.summary["instruct"]
    shares = [row["supervised_share"] for row in rows]
    assert min(shares) < seen["supervised_tokens"] / seen["computed_tokens"] < max(shares)
    assert re.search(r"gradients: lora [\d.]+, projector [\d.]+  projector moved \d+\.\d%", run.text)


def test_a_sound_run_has_no_warning_of_its_steps(run: Run) -> None:
    assert [row for row in run.log if "warning" in row and "eval_loss" not in row] == []


def test_the_worth_of_the_images_is_logged_shown_and_kept(run: Run) -> None:
    rows = [row for row in run.log if "eval_loss" in row]
    assert len(rows) == 3
    for row in rows:
        # A validation this small is its own sample.
        assert row["eval_loss_blind"] - row["image_gain"] == pytest.approx(row["eval_loss"], rel=1e-5)
        assert row["image_gain"] != 0
    assert f"without the images {rows[-1]['eval_loss_blind']:.4f}" in run.text
    kept = {name: rows[-1][name] for name in ("eval_loss", "eval_loss_blind", "image_gain")}
    assert kept.items() <= run.summary["instruct"].items()
    assert kept.items() <= read_manifest(run.directory / "instruct").metrics.items()


def test_a_blind_loss_is_the_same_with_cached_features(run: Run, instruct_file: Path, tmp_path: Path) -> None:
    cached = watched_run(
        instruct_file, *SIX_STEPS, "adapter.lora_dropout=0.1", "stages.instruct.cache_image_features=memory",
        f"output_dir={tmp_path / 'run'}",
    )  # fmt: skip
    blind = run.losses("instruct", "eval_loss_blind")
    assert cached.losses("instruct", "eval_loss_blind") == pytest.approx(blind, rel=1e-5)


def test_validation_does_not_disturb_training(run: Run, instruct_file: Path, tmp_path: Path) -> None:
    # With dropout, whose random numbers a validation must not use up.
    rarely = watched_run(
        instruct_file, SIX_STEPS[0], "stages.instruct.eval_steps=6", "adapter.lora_dropout=0.1",
        f"output_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert rarely.losses("instruct") == run.losses("instruct")
    sums = [file_sha256(one.directory / "instruct" / WEIGHTS) for one in (rarely, run)]
    assert sums[0] == sums[1]
    plain = watched_run(instruct_file, SIX_STEPS[0], "stages.instruct.eval_steps=6", f"output_dir={tmp_path / 'plain'}")
    assert plain.losses("instruct") != run.losses("instruct")


def test_frozen_weights_are_said_to_be_unchanged(run: Run) -> None:
    assert re.search(
        r"^instruct: checked: the frozen weights did not change \(\d+ tensors, 0 MiB", run.text, re.MULTILINE
    )


def made_by(change: Callable[[PackedTrainer], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `change` at every trainer before it trains."""
    original = train_module.make_trainer

    def changed(*args: Any, **kwargs: Any) -> PackedTrainer:
        trainer = original(*args, **kwargs)
        change(trainer)
        return trainer

    monkeypatch.setattr(train_module, "make_trainer", changed)


@pytest.mark.fault("training: frozen weights that change")
def test_a_vision_tower_that_changes_leaves_no_artifact(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(trainer: PackedTrainer) -> None:
        step = trainer.training_step

        def disturbed(*args: Any) -> torch.Tensor:
            with torch.no_grad():
                weight = trainer.model.get_base_model().model.vision_tower.encoder.layers[0].mlp.fc1.weight
                weight[0, 0] += 1e-6
            return step(*args)

        trainer.training_step = disturbed  # type: ignore[method-assign]

    made_by(change, monkeypatch)
    with pytest.raises(
        TrainingError, match=r"stage align: 1 of \d+ frozen .*vision_tower\.encoder\.layers\.0\.mlp\.fc1"
    ):
        watched_run(recipe_file, f"output_dir={tmp_path / 'run'}")
    assert not list((tmp_path / "run").rglob(WEIGHTS))


def spoil(record_number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the pixels of one caption's image NaN, as a broken decoder would."""
    read = ImageTransform.__call__

    def spoilt(self: ImageTransform, record: Record) -> torch.Tensor:
        pixels = read(self, record)
        return pixels * float("nan") if record.where.startswith(f"captions.json, record {record_number} ") else pixels

    monkeypatch.setattr(ImageTransform, "__call__", spoilt)
    monkeypatch.setattr(train_module, "check_first_row", lambda *_: None)


def test_a_record_that_makes_nan_stops_a_run_by_name(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(8, monkeypatch)
    with pytest.raises(TrainingError) as caught:
        watched_run(recipe_file, f"output_dir={tmp_path / 'run'}")
    message = str(caught.value)
    assert message.startswith("stage align, step ")
    assert "records: captions.json, record 8 (id c7)." in message
    assert str(tmp_path) not in message
    assert not list((tmp_path / "run").rglob(WEIGHTS))


def test_a_run_may_leave_the_step_out(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(8, monkeypatch)
    skip = ("stages.align.on_non_finite=skip", "stages.align.max_non_finite_steps=1")
    made = watched_run(recipe_file, *skip, "stages.instruct.max_steps=1", f"output_dir={tmp_path / 'run'}")
    [row] = [row for row in made.log if "record 8" in row.get("warning", "")]
    assert row["stage"] == "align"
    assert "The step was left out, 1 of at most 1." in made.text
    assert len(made.losses("align")) == 2
    figures = [FIGURES & row.keys() for row in made.log if row["stage"] == "align" and "loss" in row]
    assert figures == [FIGURES - {"grad_norm_lora"}] * 2
    assert made.text.count("the frozen weights did not change") == 2
    assert all(math.isfinite(loss) for loss in made.losses("align"))
    assert all(torch.isfinite(one).all() for one in made.stages["align"].after.values() if one.is_floating_point())
    with pytest.raises(TrainingError, match="More than max_non_finite_steps 1 steps"):
        watched_run(recipe_file, *skip, "stages.align.num_train_epochs=2", f"output_dir={tmp_path / 'twice'}")


def test_a_stopped_run_goes_on_from_the_checkpoint_it_names(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(5, monkeypatch)
    saving = ("stages.align.save_steps=1", "stages.instruct.max_steps=1")
    skip = (*saving, "stages.align.on_non_finite=skip")
    straight = watched_run(recipe_file, *skip, f"output_dir={tmp_path / 'straight'}")
    [warned] = [row["step"] for row in straight.log if "record 5" in row.get("warning", "")]
    with pytest.raises(TrainingError) as caught:
        watched_run(recipe_file, *saving, f"output_dir={tmp_path / 'run'}")
    assert f"Last good checkpoint: checkpoints/align/step-{warned - 1}." in str(caught.value)
    run_recipe(load_recipe(recipe_file, [*skip, f"output_dir={tmp_path / 'run'}"]), Console(quiet=True), resume="exact")
    for stage in ("align", "instruct"):
        sums = [file_sha256(tmp_path / name / stage / WEIGHTS) for name in ("straight", "run")]
        assert sums[0] == sums[1]
    logs = [log_of(tmp_path / name) for name in ("straight", "run")]
    assert logs[0] == logs[1]
