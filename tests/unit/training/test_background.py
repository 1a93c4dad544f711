"""Weights of the best validation are written in a thread, while the training continues."""

from __future__ import annotations

import errno
import time
from contextlib import nullcontext
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from safetensors.torch import load_file

from lora_llava.errors import TrainingError
from lora_llava.formats.names import WEIGHTS
from lora_llava.training.checkpoints.background import BackgroundWriter
from lora_llava.training.checkpoints.files import read_verified
from tests.helpers.steps import same
from tests.unit.training.test_saver import Artifact, Clock, _no_run, clock, held_at, saver_of, trainer_of

__all__ = ["_no_run", "clock"]


def test_k31_better_weights_are_written_while_the_training_continues(tmp_path: Path, clock: Clock) -> None:
    trainer = trainer_of(tmp_path)
    artifact = Artifact(tmp_path, clock, trainer.model)
    saver = saver_of(artifact)
    saver.save(trainer)
    begins, ends = Event(), Event()
    write = artifact.write

    def slowly(*args: Any) -> None:
        begins.set()
        assert ends.wait(60)
        write(*args)

    artifact.write = slowly  # type: ignore[method-assign]
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
    saver.save(trainer)
    assert artifact.written[1:] == [
        ("step-3", 3, {"eval_loss": 0.3}),
        ("step-4", 4, {"eval_loss": 0.2}),
        ("step-5", 5, {}),
    ]
    assert not read_verified(saver.parent / "step-4").resumable
    assert read_verified(saver.parent / "step-5").resumable
    assert {path.name for path in saver.parent.iterdir()} == {"step-2", "step-4", "step-5"}


def test_k31_weights_that_cannot_be_written_end_the_training_at_the_next_checkpoint(
    tmp_path: Path, clock: Clock
) -> None:
    trainer = trainer_of(tmp_path)
    artifact = Artifact(tmp_path, clock, trainer.model)
    saver = saver_of(artifact)
    saver.save(trainer)

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    artifact.write = fail  # type: ignore[method-assign]
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
