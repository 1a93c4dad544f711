"""Runs that several files of tests stop, or go on with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.resuming import stopped_run, write_project


@pytest.fixture(scope="session")
def project(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("resume"), tiny_base)


@pytest.fixture(scope="session")
def halted(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in step 8 of `instruct`; it has checkpoints of steps 4 and 6."""
    return stopped_run(project, tmp_path_factory.mktemp("halted") / "run", "instruct", 8)


@pytest.fixture
def broken_off(halted: Path, tmp_path: Path) -> Path:
    """A copy of `halted`, to be changed."""
    return Path(shutil.copytree(halted, tmp_path / "run"))
