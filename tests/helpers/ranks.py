"""Runs of several processes over gloo on the CPU, forked from one that has imported everything, to be quick."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

import lora_llava.training.run as run_module
from lora_llava.cli import cli
from lora_llava.data.record import Record
from lora_llava.data.rows import ImageTransform
from lora_llava.training.checkpoints import saver
from lora_llava.training.trainer import PackedTrainer
from tests.helpers.processes import environment
from tests.helpers.resuming import at_step

Act = Callable[[], None]
"""What is changed in a process before it runs the command."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended, and what it printed."""

    code: int
    out: str
    err: str


def finetune(directory: Path, arguments: Sequence[str], count: int, act: Act | None = None) -> list[Ended]:
    """Run `lora-llava finetune ARGUMENTS` in `count` processes; `directory` takes their output."""
    directory.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lora_llava.training.run", "deepspeed", __name__])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    for rank in range(count):
        work = (environment(rank, count, store.port), ["finetune", *arguments], str(directory / str(rank)), act)
        processes.append(context.Process(target=_run, args=work))
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(100)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert None not in codes, f"still running: {codes}"
    texts = [[(directory / f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(count)]
    return [Ended(code or 0, *both) for code, both in zip(codes, texts, strict=True)]


def _run(variables: dict[str, str], arguments: list[str], output: str, act: Act | None) -> None:
    os.environ.clear()
    os.environ.update(variables)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    torch.set_num_threads(1)
    # The picture takes as long as the training.
    pytest.MonkeyPatch().setattr(run_module, "plot_loss", lambda *_: None)
    if act is not None:
        act()
    code: Any = 0
    try:
        cli(arguments, prog_name="lora-llava")
    except SystemExit as ended:
        code = ended.code
    for stream in (sys.stdout, sys.stderr):
        with suppress(ValueError):
            stream.flush()
    os._exit(int(code or 0))


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
