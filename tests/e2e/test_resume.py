"""A stopped run resumes as if nothing had happened, or says why it cannot."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from lora_llava.artifact import load_artifact, read_manifest
from lora_llava.cli import cli
from lora_llava.errors import TrainingError
from lora_llava.evaluation.run import Candidate
from lora_llava.formats.names import WEIGHTS
from lora_llava.run_directory import output
from lora_llava.run_directory.lock import LOCK
from lora_llava.system.files import file_sha256
from lora_llava.training import run as run_module
from lora_llava.training.checkpoints import saver as resumable
from lora_llava.training.checkpoints.files import DamagedCheckpointError, read_verified
from lora_llava.training.trainer import PackedTrainer
from tests.helpers.resuming import (
    SETTINGS,
    STATE,
    Stopped,
    at_step,
    log_of,
    outcome,
    stop,
    stopped_run,
    train,
)


@pytest.fixture(scope="module")
def whole(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    train(project, directory)
    return directory


@pytest.fixture(scope="module")
def straight(whole: Path) -> dict[str, Any]:
    return outcome(whole)


def checkpoint_steps(directory: Path, stage: str = "instruct") -> list[int]:
    return sorted(int(one.name.removeprefix("step-")) for one in (directory / "checkpoints" / stage).iterdir())


@pytest.mark.fault("checkpoints: a resumed run that differs from an uninterrupted one")
@pytest.mark.fault("checkpoints: a resume in the middle of a step or an epoch")
@pytest.mark.parametrize(("stage", "step"), [("align", 5), ("instruct", 2)])
def test_a_stopped_run_goes_on_to_the_bit(
    project: Path, straight: dict[str, Any], tmp_path: Path, stage: str, step: int
) -> None:
    stopped_run(project, tmp_path / "run", stage, step)
    train(project, tmp_path / "run", resume="exact")
    assert outcome(tmp_path / "run") == straight


def test_a_loss_between_two_lines_of_the_log_goes_on(project: Path, tmp_path: Path) -> None:
    # 25 steps: a line every two; checkpoints of odd steps, too.
    instruct = ["stages.align=null", "stages.instruct.num_train_epochs=5", "stages.instruct.num_sample_answers=0"]
    train(project, tmp_path / "straight", *instruct)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, "instruct", 11, stop)
        with pytest.raises(Stopped):
            train(project, tmp_path / "run", *instruct)
    _, shown = train(project, tmp_path / "run", *instruct, resume="exact")
    assert "resuming after step 9" in shown
    lines = log_of(tmp_path / "run")
    assert [row["step"] for row in lines if "loss" in row][:5] == [2, 4, 6, 8, 10]
    assert [row["step"] for row in lines if "loss" in row][-1] == 25
    assert lines == log_of(tmp_path / "straight")
    assert file_sha256(tmp_path / "run" / "instruct" / WEIGHTS) == file_sha256(
        tmp_path / "straight" / "instruct" / WEIGHTS
    )


@pytest.mark.fault("checkpoints: a resume in the middle of a step or an epoch")
def test_finished_stages_are_kept_and_times_add_up(
    project: Path, straight: dict[str, Any], broken_off: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of step 4 only the weights were saved, for their validation loss.
    assert checkpoint_steps(broken_off) == [3, 4, 6]
    before = json.loads((broken_off / "summary.json").read_text(encoding="utf-8"))
    at_step(monkeypatch, "align", 1, stop)
    summary, shown = train(project, broken_off, resume="exact")
    assert outcome(broken_off) == straight
    assert "align: trained already" in shown
    assert "instruct: resuming after step 6" in shown
    assert summary["align"] == before["align"]
    seconds = [row["seconds"] for row in output.read_log(broken_off) if "seconds" in row and row["stage"] == "instruct"]
    assert seconds == sorted(seconds)
    spent = read_verified(broken_off / "checkpoints" / "instruct" / "step-10").progress
    assert summary["seconds"]["instruct"] >= round(spent.seconds, 1) >= summary["instruct"]["saving_seconds"] > 0
    assert summary["instruct"]["checkpoints_saved"] == spent.num_saved == 6
    assert summary["instruct"]["steps"] == 10


def test_a_finished_run_has_nothing_left_to_do(
    project: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    before = json.loads((whole / "summary.json").read_text(encoding="utf-8"))
    for stage in ("align", "instruct"):
        at_step(monkeypatch, stage, 1, stop)
    summary, _ = train(project, tmp_path / "run", resume="exact")
    assert {key: summary[key] for key in ("align", "instruct")} == {key: before[key] for key in ("align", "instruct")}
    assert outcome(tmp_path / "run") == outcome(whole)


def test_a_checkpoint_is_an_artifact(halted: Path, tmp_path: Path) -> None:
    checkpoint = halted / "checkpoints" / "instruct" / "step-6"
    manifest = read_manifest(checkpoint)
    assert manifest.seen["steps"] == 6
    assert manifest.parent_sha256 == file_sha256(halted / "align" / WEIGHTS)
    loaded, _ = load_artifact(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    held = dict(loaded.model.named_parameters())
    for name, tensor in load_file(checkpoint / WEIGHTS).items():
        here = name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
        here = here.replace("multi_modal_projector.", "multi_modal_projector.modules_to_save.default.")
        assert torch.equal(held[here], tensor), name
    assert {path.suffix for path in checkpoint.iterdir()} == {".json", ".safetensors", ".yaml", ".jinja"}
    done = CliRunner().invoke(cli, ["merge", str(checkpoint), str(tmp_path / "merged")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.fault("checkpoints: a resume from one with a missing file, a truncated file, or a flipped byte")
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    project: Path, straight: dict[str, Any], broken_off: Path
) -> None:
    path = broken_off / "checkpoints" / "instruct" / "step-6" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    _, shown = train(project, broken_off, resume="exact")
    assert "step-6 is damaged (optimizer.safetensors was altered" in shown
    assert "resuming from step-3 instead" in shown
    assert outcome(broken_off) == straight


@pytest.mark.fault("checkpoints: a resume from one with a missing file, a truncated file, or a flipped byte")
def test_a_changed_byte_in_any_file_of_a_checkpoint_is_named(broken_off: Path) -> None:
    checkpoint = broken_off / "checkpoints" / "instruct" / "step-6"
    files = {path.name: path for path in checkpoint.iterdir()}
    assert files.keys() >= {WEIGHTS, *STATE, "trainer_state.json", "manifest.json", "checkpoint.json", "recipe.yaml"}
    for name, path in files.items():
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        with pytest.raises(DamagedCheckpointError, match=name):
            read_verified(checkpoint)
        path.write_bytes(content)
    read_verified(checkpoint)


@pytest.mark.fault("checkpoints: a resume from one with a missing file, a truncated file, or a flipped byte")
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_no_whole_checkpoint_is_left(project: Path, broken_off: Path, damage: str) -> None:
    for directory in (broken_off / "checkpoints" / "instruct").iterdir():
        path = directory / WEIGHTS
        path.write_bytes(path.read_bytes()[:-20]) if damage == "cut" else path.unlink()
    reason = r"has .* bytes, not" if damage == "cut" else "is missing"
    with pytest.raises(TrainingError, match=f"no whole checkpoint is left: .*step-6 is damaged .*{reason}"):
        train(project, broken_off, resume="exact")


def test_a_damaged_artifact_of_a_finished_stage_is_named(project: Path, broken_off: Path) -> None:
    path = broken_off / "align" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(TrainingError, match=r"was altered.*remove .*align to have it made again"):
        train(project, broken_off, resume="exact")
    shutil.rmtree(broken_off / "align")
    _, shown = train(project, broken_off, resume="exact")
    assert "align: resuming after step 9" in shown


def sent(*signals: signal.Signals) -> Callable[[PackedTrainer], None]:
    """Send signals to this process and, as a terminal does, to its workers."""

    def send(_: PackedTrainer) -> None:
        for number in signals:
            for worker in multiprocessing.active_children():
                assert worker.pid is not None
                # From outside: of its parent a worker takes it.
                subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
            signal.raise_signal(number)

    return send


@pytest.mark.fault("checkpoints: SIGINT and SIGTERM during a run")
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 0), (signal.SIGTERM, 1)])
def test_a_signal_ends_the_step_saves_and_exits(
    project: Path, straight: dict[str, Any], tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    handlers = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    settings = [*SETTINGS, f"output_dir={tmp_path / 'run'}", f"stages.instruct.dataloader_num_workers={workers}"]
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, "instruct", 5, sent(number))
        patch.setattr(resumable, "MAX_BEST_SHARE", math.inf)
        done = CliRunner().invoke(cli, ["finetune", str(project), *settings])
    assert done.exit_code == 128 + number
    assert {one: signal.getsignal(one) for one in handlers} == handlers
    assert f"stopped by {number.name} after step 5 of stage instruct, which is saved. Continue with: " in done.output
    assert "Error" not in done.output
    assert checkpoint_steps(tmp_path / "run") == [3, 4, 5]
    command = done.output.rpartition("Continue with: ")[2].split()
    assert command[:2] == ["lora-llava", "finetune"]
    done = CliRunner().invoke(cli, command[1:])
    assert done.exit_code == 0, done.output
    assert outcome(tmp_path / "run") == straight


@pytest.mark.fault("checkpoints: SIGINT and SIGTERM during a run")
def test_a_second_signal_stops_at_once(project: Path, tmp_path: Path) -> None:
    arguments = ["finetune", str(project), *SETTINGS, f"output_dir={tmp_path / 'run'}"]
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, "align", 2, sent(signal.SIGINT, signal.SIGINT))
        done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 130
    assert done.output.endswith("stopped\n")
    assert not list((tmp_path / "run" / "checkpoints" / "align").glob("*"))


def test_validation_draws_no_random_numbers(project: Path, tmp_path: Path) -> None:
    few = ("stages.align=null", "stages.instruct.max_steps=3", "stages.instruct.logging_steps=1")
    losses = []
    for name, settings in {"often": 1, "never": None}.items():
        every = f"stages.instruct.eval_steps={json.dumps(settings)}"
        train(project, tmp_path / name, *few, every)
        losses.append([row["loss"] for row in log_of(tmp_path / name) if "loss" in row])
    assert losses[0] == losses[1]


def test_an_evaluation_that_was_not_done_is_done(
    project: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    asked = [
        f"evaluation.data.{key}={project.parent / name}"
        for key, name in {"path": "train.json", "image_root": "images"}.items()
    ]
    done: list[Path] = []
    locks: list[str] = []

    def evaluate(candidate: Candidate, *_: Any, **__: Any) -> dict[str, Any]:
        done.append(candidate.directory)
        locks.append((tmp_path / "run" / LOCK).read_text(encoding="utf-8"))
        return {"questions": 1}

    monkeypatch.setattr(run_module, "evaluate_artifact", evaluate)
    for _ in range(2):
        summary, _ = train(project, tmp_path / "run", *asked, resume="exact")
    assert summary["evaluation"] == {"questions": 1}
    assert done == [tmp_path / "run" / "instruct"]
    assert locks == [f"{os.getpid()}\n"]
