"""Checkpoints are written in a thread, while the training continues."""

from __future__ import annotations

import errno
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from threading import Event, Timer
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_llava.errors import TrainingError
from lora_llava.formats.names import WEIGHTS
from lora_llava.training.checkpoints import saver as saver_module
from lora_llava.training.checkpoints.background import BackgroundWriter
from lora_llava.training.checkpoints.files import MANIFEST, read_verified
from lora_llava.training.checkpoints.held import copy_to_host
from lora_llava.training.checkpoints.saver import CheckpointSaver
from lora_llava.training.trainer import PackedTrainer
from tests.helpers.steps import same
from tests.unit.training.test_saver import Artifact, Clock, _no_run, clock, held_at, save, saver_of, trainer_of

__all__ = ["_no_run", "clock"]


def before_its_end(directory: Path, clock: Clock) -> tuple[PackedTrainer, Artifact, CheckpointSaver]:
    """A trainer with steps to go after the next checkpoint, its artifact and its saver."""
    trainer = trainer_of(directory)
    trainer.state.max_steps = 9
    artifact = Artifact(directory, clock, trainer.model)
    return trainer, artifact, saver_of(artifact)


def slowed(artifact: Artifact) -> tuple[Event, Event]:
    """Have each write set the first event, and wait for the second."""
    begins, ends = Event(), Event()
    write = artifact.write

    def slowly(*args: Any) -> None:
        begins.set()
        assert ends.wait(60)
        write(*args)

    artifact.write = slowly  # type: ignore[method-assign]
    return begins, ends


def failing(artifact: Artifact) -> None:
    """Have each write find a full disk."""

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    artifact.write = fail  # type: ignore[method-assign]


def train_further(trainer: PackedTrainer) -> None:
    """Take a step, and change everything else that a checkpoint holds."""
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    torch.rand(3)
    trainer.loss_sum += 1.0
    trainer.state.global_step += 1
    trainer.state.log_history.append({"loss": 9.0, "step": trainer.state.global_step})
    trainer.state.stateful_callbacks["a check"]["seen"].append(9)


def files_of(directory: Path) -> dict[str, bytes]:
    """Read the files of a checkpoint, but for the manifest, which holds times."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != MANIFEST}


@pytest.mark.fault("checkpoints: a resumed run that differs from an uninterrupted one")
def test_k31_a_whole_checkpoint_holds_its_step_however_far_the_training_is_when_it_is_written(
    tmp_path: Path, clock: Clock
) -> None:
    written = {}
    for label in ("waited", "at once"):
        trainer = trainer_of(tmp_path)
        artifact = Artifact(tmp_path / label, clock, trainer.model)
        saver = saver_of(artifact)
        trainer.state.max_steps, trainer.state.stateful_callbacks = 9, {"a check": {"seen": [1]}}
        # Without the times of a real one.
        trainer.state.log_history = [{"loss": 2.0, "step": 2}]
        begins, ends = slowed(artifact)
        if label == "waited":
            ends.set()
        torch.manual_seed(7)
        saver.save(trainer)
        if label == "waited":
            saver.background.wait()
        assert begins.wait(60)
        assert saver.background.is_busy == (label == "at once")
        train_further(trainer)
        assert not saver.is_due(trainer, None)
        ends.set()
        saver.background.wait()
        checkpoint = saver.parent / "step-2"
        assert read_verified(checkpoint).resumable
        assert read_verified(checkpoint).progress.loss_sum == float(trainer.loss_sum) - 1.0
        written[label] = files_of(checkpoint)
    assert len(written["waited"]) > 5
    assert written["waited"] == written["at once"]


def test_k31_a_whole_checkpoint_that_cannot_be_written_ends_the_training_at_the_next_step(
    tmp_path: Path, clock: Clock
) -> None:
    trainer, artifact, saver = before_its_end(tmp_path, clock)
    failing(artifact)
    saver.save(trainer)
    assert saver.background._thread is not None
    saver.background._thread.join()
    trainer.state.global_step = 3
    with pytest.raises(TrainingError, match=r"checkpoint of step 2 could not be written .*No space left"):
        saver.is_due(trainer, None)
    # It is raised once; a later checkpoint is tried again.
    assert not saver.is_due(trainer, None)


def test_the_newest_checkpoint_is_named_once_it_is_written_and_its_error_is_raised_later(
    tmp_path: Path, clock: Clock
) -> None:
    trainer, artifact, saver = before_its_end(tmp_path, clock)
    begins, ends = slowed(artifact)
    saver.save(trainer)
    assert begins.wait(60)
    Timer(0.05, ends.set).start()
    assert saver.last_whole() == "checkpoints/instruct/step-2"
    failing(artifact)
    trainer.state.global_step = 3
    saver.save(trainer)
    assert saver.last_whole() == "checkpoints/instruct/step-2"
    with pytest.raises(TrainingError, match="checkpoint of step 3"):
        saver.is_due(trainer, None)


@pytest.mark.parametrize("why", ["last step", "signal", "first of a run"])
def test_k31_a_checkpoint_that_nothing_follows_is_waited_for(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    trainer = trainer_of(tmp_path)
    artifact = Artifact(tmp_path, clock, trainer.model)
    saver = saver_of(artifact)
    trainer.state.max_steps = 2 if why == "last step" else 9
    clock.of_a_write = 3.0
    if why == "signal":
        saver.interruption.received = signal.SIGTERM
        assert saver.is_due(trainer, None)
    if why == "first of a run":
        monkeypatch.setattr(saver_module, "is_pending", lambda _: True)
    saver.save(trainer)
    assert not saver.background.is_busy
    assert (saver.last_duration, saver.saving_seconds) == (3.0, 3.0)
    assert read_verified(saver.parent / "step-2").resumable
    failing(artifact)
    with pytest.raises(TrainingError, match=r"checkpoint of step 2"):
        saver.save(trainer)


def test_what_is_held_is_copied_once_and_shares_no_memory() -> None:
    whole = torch.arange(12.0)
    tensors = {
        "rows": whole.view(3, 4)[1:],
        "columns": whole.view(3, 4).t(),
        "scalar": torch.tensor(5),
        "none": whole[:0],
    }
    tensors["bf16"] = whole.bfloat16().requires_grad_()
    copies = copy_to_host(tensors)
    expected = {name: one.detach().clone() for name, one in tensors.items()}
    assert list(copies) == list(tensors)
    whole.zero_()
    tensors["scalar"].zero_()
    for name, copied in copies.items():
        assert copied.dtype == expected[name].dtype
        assert torch.equal(copied, expected[name])
        assert copied.is_contiguous()
        assert not copied.requires_grad
    addresses = [one.untyped_storage().data_ptr() for name, one in copies.items() if name != "none"]
    assert len(set(addresses)) == len(addresses)


def test_k31_better_weights_are_written_while_the_training_continues(tmp_path: Path, clock: Clock) -> None:
    trainer = trainer_of(tmp_path)
    artifact = Artifact(tmp_path, clock, trainer.model)
    saver = saver_of(artifact)
    save(saver, trainer)
    begins, ends = slowed(artifact)
    best = held_at(saver, trainer, 3, 0.3)
    saver.saves_held = True
    saver.save(trainer)
    # The training has its thread back while the weights are written, and trains further.
    assert begins.wait(60)
    assert saver.background.is_busy
    assert saver.held is None
    assert (saver.num_saved, saver.saving_seconds) == (2, 0.0)
    # Even better ones are held meanwhile, and not written at the same time.
    clock.now += 10_000.0
    saver.last_saved = clock.now
    trainer.state.max_steps, trainer.state.global_step = 100, 4
    assert not saver.is_due(trainer, 0.2)
    assert saver.held is not None
    ends.set()
    saver.background.wait()
    assert same(load_file(saver.parent / "step-3" / WEIGHTS), best)
    trainer.state.global_step = 5
    save(saver, trainer)
    assert artifact.written[1:] == [
        ("step-3", 3, {"eval_loss": 0.3}),
        ("step-4", 4, {"eval_loss": 0.2}),
        ("step-5", 5, {}),
    ]
    assert not read_verified(saver.parent / "step-4").resumable
    assert read_verified(saver.parent / "step-5").resumable
    assert {path.name for path in saver.parent.iterdir()} == {"step-2", "step-4", "step-5"}


def test_k31_weights_that_cannot_be_written_end_the_training_at_the_next_step(tmp_path: Path, clock: Clock) -> None:
    trainer = trainer_of(tmp_path)
    artifact = Artifact(tmp_path, clock, trainer.model)
    saver = saver_of(artifact)
    save(saver, trainer)
    failing(artifact)
    held_at(saver, trainer, 3, 0.3)
    saver.saves_held = True
    saver.save(trainer)
    trainer.state.global_step, saver.saves_held = 4, False
    with pytest.raises(TrainingError, match=r"weights of step 3.*"):
        saver.save(trainer)


@pytest.mark.parametrize("fails", [False, True])
def test_k31_the_end_of_the_training_waits_for_the_writer(fails: bool) -> None:
    writer, done = BackgroundWriter(), []

    def write() -> None:
        time.sleep(0.2)
        done.append(1)
        if fails:
            raise KeyError("a full disk")

    with nullcontext() if not fails else pytest.raises(KeyError), writer:
        writer.start(write)
    assert done == [1]

    # An error of the training is not replaced by one of the writer.
    def train() -> None:
        with writer:
            writer.start(write)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert done == [1, 1]
