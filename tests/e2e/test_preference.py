"""Runs of stage `prefer`: from the instruct artifact to an artifact, stopped and resumed, with a wrong reference."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_llava.artifact import read_manifest
from lora_llava.errors import TrainingError
from lora_llava.formats.names import WEIGHTS
from lora_llava.recipe.file import load_recipe
from lora_llava.run_directory import output
from lora_llava.shipping.merge.run import merge_artifact
from lora_llava.system.files import file_sha256
from lora_llava.training.objectives import reference as reference_module
from lora_llava.training.run import run_recipe
from tests.helpers.pairs import write_preference_project
from tests.helpers.resuming import STATE, log_of, stopped_run, train
from tests.helpers.runs import Run, watched_run

DIRECTORY = "checkpoints/prefer"
SETTINGS = (
    "adapter.lora_dropout=0.1", "quantization.type=nf4", "stages.prefer.num_train_epochs=2",
    "stages.prefer.logging_steps=2", "stages.prefer.eval_steps=4", "stages.prefer.save_steps=3",
)  # fmt: skip
"""10 steps; lines of the log, checkpoints and validations meet at few of them."""


@pytest.fixture(scope="module")
def project(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of `prefer` alone."""
    return write_preference_project(tmp_path_factory.mktemp("pairs"), tiny_base)


@pytest.fixture(scope="module")
def halted(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in step 6."""
    return stopped_run(project, tmp_path_factory.mktemp("halted") / "run", "prefer", 6, SETTINGS)


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return watched_run(write_preference_project(tmp_path_factory.mktemp("run"), tiny_base, "align", "instruct"))


def of_prefer(directory: Path) -> dict[str, Any]:
    """What a run must leave to the bit."""
    checkpoints = (directory / DIRECTORY).glob("step-*")
    last = max(checkpoints, key=lambda one: int(one.name.removeprefix("step-")))
    return {
        "log": log_of(directory),
        "weights": file_sha256(directory / "prefer" / WEIGHTS),
        "reference": file_sha256(directory / output.REFERENCE),
        **{name: file_sha256(last / name) for name in STATE},
    }


def test_the_stage_starts_at_the_loss_of_no_preference_and_learns_one(run: Run) -> None:
    rows = [row for row in run.log if row["stage"] == "prefer" and "loss" in row]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["reward_margin"] == pytest.approx(0, abs=1e-5)
    validations = [row for row in run.log if row["stage"] == "prefer" and "eval_loss" in row]
    assert validations[-1]["eval_loss"] < math.log(2)
    assert validations[-1]["eval_reward_margin"] > 0
    assert 0 <= validations[-1]["eval_reward_accuracy"] <= 1
    assert validations[-1]["eval_log_prob_chosen"] < 0
    assert "eval_loss_blind" not in validations[-1]


def test_it_starts_from_the_weights_of_instruct_and_leaves_an_artifact_like_it(run: Run) -> None:
    stage, before = run.stages["prefer"], run.stages["instruct"]
    assert stage.trainable == before.trainable
    assert all(torch.equal(stage.before[name], before.after[name]) for name in stage.trainable)
    assert stage.changed == stage.trainable
    manifests = [read_manifest(run.directory / name) for name in ("instruct", "prefer")]
    assert manifests[1].stage == "prefer"
    assert manifests[1].parent_sha256 == manifests[0].adapter_sha256
    files = [{path.name for path in (run.directory / name).iterdir()} for name in ("instruct", "prefer")]
    assert files[0] == files[1]


def test_the_artifact_merges(run: Run, tmp_path: Path) -> None:
    report = merge_artifact(run.directory / "prefer", tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").exists()
    assert report


@pytest.mark.fault("checkpoints: a stage of pairs that resumes with another reference")
def test_a_stopped_run_resumes_to_the_bit(project: Path, halted: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", Path(shutil.copytree(halted, tmp_path / "stopped"))
    train(project, whole, settings=SETTINGS)
    written = file_sha256(stopped / output.REFERENCE)
    train(project, stopped, resume="exact", settings=SETTINGS)
    assert file_sha256(stopped / output.REFERENCE) == written
    assert of_prefer(stopped) == of_prefer(whole)

    # A reference that is lost, or of other data, is computed again from the weights that the stage started from.
    again = Path(shutil.copytree(halted, tmp_path / "again"))
    (again / output.REFERENCE).unlink()
    train(project, again, resume="exact", settings=SETTINGS)
    assert of_prefer(again) == of_prefer(whole)


def test_a_reference_that_was_changed_is_refused(project: Path, halted: Path, tmp_path: Path) -> None:
    shutil.copytree(halted, tmp_path / "run")
    path = tmp_path / "run" / output.REFERENCE
    with safe_open(path, framework="pt") as file:
        identity = file.metadata()
    tensors = load_file(path)
    tensors["train"] = tensors["train"] + 1
    save_file(tensors, path, metadata=identity)
    with pytest.raises(TrainingError, match="reference \\(sha256 of the log-probabilities\\)"):
        train(project, tmp_path / "run", resume="exact", settings=SETTINGS)


def test_a_first_step_with_margins_stops_the_run(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = reference_module._compute

    def wrong(*args: Any) -> Any:
        return {name: values.flip(1) for name, values in compute(*args).items()}

    monkeypatch.setattr(reference_module, "_compute", wrong)
    recipe = load_recipe(project, [f"output_dir={tmp_path / 'run'}"])
    with pytest.raises(TrainingError, match=r"step 1: the loss is .* where margins of 0 would give 0.6931"):
        run_recipe(recipe, Console(file=io.StringIO()))


def test_the_checkpoint_has_the_hash_of_the_reference(run: Run) -> None:
    [path, *_] = (run.directory / DIRECTORY).glob("step-*/checkpoint.json")
    facts = json.loads(path.read_text(encoding="utf-8"))["facts"]
    assert len(facts[f"stages.prefer.{reference_module.FACT}"]) == 64
