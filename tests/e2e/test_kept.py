"""Best and last of a run: what the artifact holds, what is said of it, and that a kill changes nothing of it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_llava.artifact import read_manifest
from lora_llava.data.record import Record
from lora_llava.data.rows import ImageTransform
from lora_llava.formats.names import WEIGHTS
from lora_llava.shipping.hub.card import make_card
from lora_llava.shipping.hub.facts import gather
from lora_llava.system.files import file_sha256
from lora_llava.training.trainer import PackedTrainer
from tests.helpers.resuming import Stopped, at_step, log_of, stop, train
from tests.helpers.runs import write_data, write_recipe

OVER_FIT = (
    "stages.align=null", "stages.instruct.num_train_epochs=14", "stages.instruct.eval_steps=5",
    "stages.instruct.learning_rate=0.02", "stages.instruct.mm_projector_lr=0.02", "adapter.lora_dropout=0",
    "stages.instruct.save_steps=12", "stages.instruct.num_sample_answers=0",
)  # fmt: skip
"""42 steps, a validation every fifth; answers that nothing tells are learned by heart."""
LAST = 42
PATIENCE = (*OVER_FIT, "stages.instruct.early_stopping_patience=2")


@pytest.fixture(scope="module")
def random_answers(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over answers that have nothing to do with the images, two for each."""
    directory = tmp_path_factory.mktemp("random")
    write_data(directory)
    records = json.loads((directory / "train.json").read_text(encoding="utf-8"))
    records = [record for number, record in enumerate(records) if number % 4 < 2]
    for number, record in enumerate(records):
        record["conversations"][1]["value"] = f"{(number * 7919) % 101} {(number * 104729) % 97}"
    (directory / "train.json").write_text(json.dumps(records), encoding="utf-8")
    return write_recipe(directory, {"model_name_or_path": str(tiny_base)})


@pytest.fixture(scope="module")
def straight(random_answers: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A run that over-fits; its best is kept, as by default."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    summary, shown = train(random_answers, directory, *OVER_FIT)
    return directory, summary["instruct"], shown


@pytest.fixture(scope="module")
def stopped_early(random_answers: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The same run with an end after two validations without improvement."""
    directory = tmp_path_factory.mktemp("early") / "run"
    summary, shown = train(random_answers, directory, *PATIENCE)
    return directory, summary["instruct"], shown


def validations(directory: Path) -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in log_of(directory) if "eval_loss" in row}


def test_k6_the_artifact_holds_the_best_and_all_say_both(straight: tuple[Path, dict[str, Any], str]) -> None:
    run, summary, shown = straight
    losses = validations(run)
    best, last = min(losses, key=lambda step: losses[step]), max(losses)
    assert best < last == LAST
    assert losses[last] > losses[best]
    kept, checkpoint = (
        load_file(one / WEIGHTS) for one in (run / "instruct", run / "checkpoints/instruct" / f"step-{best}")
    )
    assert kept.keys() == checkpoint.keys()
    assert all(torch.equal(kept[name], checkpoint[name]) for name in kept)
    manifest = read_manifest(run / "instruct")
    figures = {"best_step": best, "best_eval_loss": losses[best], "last_step": last, "last_eval_loss": losses[last]}
    for metrics in (manifest.metrics, summary):
        assert metrics.items() >= (figures | {"eval_loss": losses[best]}).items()
    assert (manifest.seen["steps"], summary["steps"]) == (best, last)
    both = f"best validation loss {losses[best]:.4f} at step {best}, last {losses[last]:.4f} at step {LAST}"
    assert f"{both}; kept: step {best}, the best" in shown
    card = make_card(gather(run / "instruct", None), "someone/some-model")
    assert f"(best {losses[best]:.4g} at step {best}, last {losses[last]:.4g} at step {LAST})" in card


def test_k6_the_last_is_kept_where_the_recipe_says_so(
    random_answers: Path, straight: tuple[Path, dict[str, Any], str], tmp_path: Path
) -> None:
    run, losses = tmp_path / "run", validations(straight[0])
    shutil.copytree(straight[0], run)
    shutil.rmtree(run / "instruct")
    summary, shown = train(random_answers, run, *OVER_FIT, "stages.instruct.keep=last", resume="anyway")
    instruct = summary["instruct"]
    assert instruct["eval_loss"] == instruct["last_eval_loss"] == losses[LAST]
    assert instruct["best_eval_loss"] == min(losses.values())
    assert f"kept: step {LAST}, the last" in shown
    kept, last = (load_file(one / WEIGHTS) for one in (run / "instruct", run / f"checkpoints/instruct/step-{LAST}"))
    assert all(torch.equal(kept[name], last[name]) for name in kept)
    assert read_manifest(run / "instruct").seen["steps"] == LAST


def test_k6_a_killed_run_keeps_the_same_best(
    random_answers: Path, straight: tuple[Path, dict[str, Any], str], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, "instruct", 38, stop)
        with pytest.raises(Stopped):
            train(random_answers, tmp_path / "run", *OVER_FIT)
    summary, _ = train(random_answers, tmp_path / "run", *OVER_FIT, resume="exact")
    run, before, _ = straight
    assert file_sha256(tmp_path / "run/instruct" / WEIGHTS) == file_sha256(run / "instruct" / WEIGHTS)
    for key in ("best_step", "best_eval_loss", "last_step", "last_eval_loss", "eval_loss", "steps"):
        assert summary["instruct"][key] == before[key]
    assert log_of(tmp_path / "run") == log_of(run)


@pytest.mark.parametrize("killed", ["before", "at its end"])
def test_k6_early_stopping_is_the_same_after_a_kill(
    random_answers: Path,
    straight: tuple[Path, dict[str, Any], str],
    stopped_early: tuple[Path, dict[str, Any], str],
    tmp_path: Path,
    killed: str,
) -> None:
    losses = validations(straight[0])
    whole, summary, shown = stopped_early
    end = summary["steps"]
    assert end < LAST
    early = validations(whole)
    assert early == {step: loss for step, loss in losses.items() if step <= end}
    stopped_best = min(early, key=lambda step: early[step])
    assert (summary["best_step"], end) == (stopped_best, stopped_best + 10)
    assert f"stopped after step {end} of {LAST}: 2 validations without improvement" in shown
    with pytest.MonkeyPatch.context() as patch:
        if killed == "before":
            at_step(patch, "instruct", end - 1, stop)
        else:
            patch.setattr(PackedTrainer, "after_training", lambda _: stop(_))
        with pytest.raises(Stopped):
            train(random_answers, tmp_path / "run", *PATIENCE)
    again, _ = train(random_answers, tmp_path / "run", *PATIENCE, resume="exact")
    assert again["instruct"]["steps"] == end
    assert file_sha256(tmp_path / "run/instruct" / WEIGHTS) == file_sha256(whole / "instruct" / WEIGHTS)
    assert log_of(tmp_path / "run") == log_of(whole)


def test_k7_over_fitting_is_named_once(straight: tuple[Path, dict[str, Any], str]) -> None:
    warnings = [row["warning"] for row in log_of(straight[0]) if "warning" in row]
    assert [one for one in warnings if one.startswith("over-fitting: the validation loss rose from ")]
    assert sum(one.count("over-fitting") for one in warnings) == 1
    assert not any("does not look" in one for one in warnings)


def test_k7_a_ruined_run_is_told_at_that_step(tiny_base: Path, tmp_path: Path) -> None:
    write_data(tmp_path)
    recipe = write_recipe(tmp_path, {"model_name_or_path": str(tiny_base)})
    good = (
        "stages.align=null", "stages.instruct.num_train_epochs=12", "stages.instruct.eval_steps=null",
        "stages.instruct.learning_rate=0.02", "stages.instruct.num_sample_answers=0",
    )  # fmt: skip
    train(recipe, tmp_path / "good", *good)
    ruin = (
        "stages.align=null", f"start_from={tmp_path / 'good' / 'instruct'}", "stages.instruct.learning_rate=0.1",
        "stages.instruct.mm_projector_lr=0.1", "stages.instruct.lr_scheduler_type=constant",
        "stages.instruct.eval_steps=null", "stages.instruct.num_train_epochs=1", "stages.instruct.num_sample_answers=0",
    )  # fmt: skip
    train(recipe, tmp_path / "run", *ruin)
    losses = {row["step"]: row["loss"] for row in log_of(tmp_path / "run") if "loss" in row}
    [(step, warning)] = [
        (row["step"], row["warning"]) for row in log_of(tmp_path / "run") if "diverged" in row.get("warning", "")
    ]
    first = next(number for number in losses if losses[number] > 4 * losses[1] + 1)
    assert step == first
    assert warning.startswith(f"step {first}: the loss rose from ")
    assert "Last good checkpoint: none yet" in warning


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_k39_a_validation_image_that_is_not_finite_is_named_and_left_out(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    write_data(tmp_path)
    recipe = write_recipe(tmp_path, {"model_name_or_path": str(tiny_base)})
    records = json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))
    (tmp_path / "held_out.json").write_text(json.dumps(records[:12]), encoding="utf-8")
    (tmp_path / "train.json").write_text(json.dumps(records[12:]), encoding="utf-8")
    read = ImageTransform.__call__

    def spoiled(self: ImageTransform, record: Record) -> torch.Tensor:
        pixels = read(self, record)
        return pixels * value if record.where.startswith("held_out.json, record 5 ") else pixels

    monkeypatch.setattr(ImageTransform, "__call__", spoiled)
    held_out = f"stages.instruct.data.validation={{path: {tmp_path / 'held_out.json'}}}"
    # Each question in a separate row: one record is spoiled, not its neighbors.
    alone = (
        "stages.align=null",
        "stages.instruct.max_steps=6",
        "stages.instruct.eval_steps=3",
        "stages.instruct.branches_per_tree=1",
    )
    summary, shown = train(recipe, tmp_path / "run", held_out, *alone)
    rows = log_of(tmp_path / "run")
    warnings = [row["warning"] for row in rows if "left out of the validation loss" in row.get("warning", "")]
    assert len(warnings) == 1
    assert "held_out.json, record 5 (id q1-0) (its image holds NaN or infinity)" in warnings[0]
    assert "held_out.json, record 1 " not in warnings[0]
    assert "nan" not in shown
    assert all(math.isfinite(row["eval_loss"]) for row in rows if "eval_loss" in row)
    assert math.isfinite(summary["instruct"]["eval_loss"])
    for path in (tmp_path / "run").rglob("*.json*"):
        for line in (
            path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text("utf-8")]
        ):
            json.loads(line, parse_constant=lambda name, path=path: pytest.fail(f"{path} holds {name}"))
