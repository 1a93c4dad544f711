"""Runs of several processes, and what may happen to one of them."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

import lora_llava.training.run as run_module
from lora_llava.cli import cli
from lora_llava.data.record import Record
from lora_llava.data.rows import ImageTransform
from lora_llava.training.checkpoints import saver
from lora_llava.training.trainer import PackedTrainer
from tests.helpers.processes import Ended, run_together
from tests.helpers.resuming import at_step

Act = Callable[[], None]
"""What is changed in a process before it runs the command."""


def finetune(directory: Path, arguments: Sequence[str], count: int, act: Act | None = None) -> list[Ended]:
    """Run `lora-llava finetune ARGUMENTS` in `count` processes; `directory` takes their output."""
    return run_together(directory, partial(_finetune, arguments, act), count)


def _finetune(arguments: Sequence[str], act: Act | None) -> None:
    torch.set_num_threads(1)
    # The picture takes as long as the training.
    pytest.MonkeyPatch().setattr(run_module, "plot_loss", lambda *_: None)
    if act is not None:
        act()
    cli(["finetune", *arguments], prog_name="lora-llava")


def _signal(rank: int, stage: str, step: int, number: int) -> None:
    def send(_trainer: PackedTrainer) -> None:
        os.kill(os.getpid(), number)

    if os.environ["RANK"] == str(rank):
        at_step(pytest.MonkeyPatch(), stage, step, send)


def signalled(rank: int, stage: str, step: int, number: signal.Signals) -> Act:
    """Send one process a signal while it computes a step."""
    return partial(_signal, rank, stage, step, number)


def _spoil(where: str) -> None:
    read = ImageTransform.__call__

    def spoilt(self: ImageTransform, record: Record) -> torch.Tensor:
        pixels = read(self, record)
        return pixels * float("nan") if record.where.startswith(where) else pixels

    pytest.MonkeyPatch().setattr(ImageTransform, "__call__", spoilt)


def spoilt_image(where: str) -> Act:
    """Make the pixels of the records whose place begins with `where` NaN, as a broken decoder would."""
    return partial(_spoil, where)


def _fill_disk() -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if os.environ["RANK"] == "0":
        pytest.MonkeyPatch().setattr(saver, "write_checkpoint", full)


def full_disk() -> Act:
    """Let the first process find the disk full when it saves."""
    return _fill_disk
