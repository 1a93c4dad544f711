"""Runs in processes of their own, forked from this one, where everything is imported already."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.disk import Disk
from tests.helpers.resuming import outcome, train, write_project

FEW = (
    "stages.align.num_train_epochs=2", "stages.align.save_steps=2", "stages.instruct.num_train_epochs=1",
    "stages.instruct.save_steps=2", "stages.instruct.eval_steps=3", "stages.instruct.num_sample_answers=0",
)  # fmt: skip
"""6 steps in `align`, 5 in `instruct`; `packing: tree` is the default."""


@dataclass(frozen=True)
class Straight:
    """A run that nothing stopped: what it leaves, and all that it did to the disk."""

    recipe: Path
    outcome: dict[str, Any]
    calls: list[tuple[str, str]]
    bytes: int


@pytest.fixture(scope="session")
def straight(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    recipe = write_project(tmp_path_factory.mktemp("torture"), tiny_base)
    directory = tmp_path_factory.mktemp("straight") / "run"
    disk = Disk(directory)
    with pytest.MonkeyPatch.context() as patch:
        disk.install(patch)
        train(recipe, directory, *FEW)
    calls = [(name, str(Path(path).relative_to(directory))) for name, path in disk.calls]
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return Straight(recipe, outcome(directory), calls, size)


def forked(work: Callable[[], Any], errors: Path) -> int:
    """Do `work` in a forked process; return its exit code, negative if a signal ended it."""
    with warnings.catch_warnings():
        # Later Pythons warn of forks while threads run; those of pytest-xdist only wait.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 - the parent shows it
            errors.write_text(traceback.format_exc(), encoding="utf-8")
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
