"""A run that was stopped goes on as if nothing had happened, or says why it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.resuming import Stopped, at_step, outcome, stop, train, write_project


@pytest.fixture(scope="module")
def recipe(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("resume"), tiny_base)


@pytest.fixture(scope="module")
def straight(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("straight") / "run"
    train(recipe, directory)
    return outcome(directory)


@pytest.mark.parametrize(("stage", "step"), [("align", 5), ("instruct", 2), ("instruct", 9)])
def test_a_stopped_run_goes_on_to_the_bit(
    recipe: Path, straight: dict[str, Any], tmp_path: Path, stage: str, step: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, stage, step, stop)
        with pytest.raises(Stopped):
            train(recipe, tmp_path / "run")
    train(recipe, tmp_path / "run", resume="exact")
    assert outcome(tmp_path / "run") == straight
