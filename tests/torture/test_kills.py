"""A run that is killed at any moment, and started again, ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_llava.errors import TrainingError
from lora_llava.run_directory.written import EXCHANGE, NEW
from lora_llava.system.files import STAGING
from lora_llava.training.trainer import PackedTrainer
from tests.helpers.disk import Disk
from tests.helpers.resuming import at_step, outcome, train
from tests.torture.conftest import FEW, Straight, forked

Moment = tuple[str, int]
"""What is counted, calls to the disk or optimizer steps of a stage, and the one that is the last."""
FIRST: tuple[tuple[str, str], ...] = (
    ("save_file", "checkpoints/align"), ("rename", "checkpoints/instruct"), ("fsync", "checkpoints/instruct"),
)  # fmt: skip
"""What the short form must hold: half of the tensors, before the directory has its name, what was not flushed."""
STEPS: tuple[Moment, ...] = (("instruct", 5), ("align", 4), ("align", 1), ("instruct", 1))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kill" in metafunc.fixturenames:
        metafunc.parametrize("kill", range(metafunc.config.getoption("--kills")))


def moments(calls: list[tuple[str, str]]) -> list[Moment]:
    """Order all moments: one of each kind first, a step of the training now and then, then what is left, at random.

    A kind is a call (write, flush, rename, removal, ...) on a checkpoint of a stage, an artifact, or another file.
    """
    kinds: dict[tuple[str, str], list[int]] = {}
    for number, (name, path) in enumerate(calls):
        parts = Path(path).parts or (".",)
        place = "/".join(parts[:2]) if parts[0] == "checkpoints" else parts[0]
        # What is being written lies in directories of random names.
        place = STAGING if place.startswith(STAGING) else place
        kinds.setdefault((name, place), []).append(number)
    rng = random.Random(0)
    once = [*FIRST, *rng.sample(sorted(kinds.keys() - set(FIRST)), len(kinds) - len(FIRST))]
    chosen = [("disk", rng.choice(kinds[kind])) for kind in once]
    for place, step in enumerate(STEPS):
        chosen.insert(3 + 4 * place, step)
    return chosen + [("disk", number) for number in rng.sample(range(len(calls)), len(calls))]


def die(name: str, path: str) -> None:
    """Die here; of what was written and not flushed, a half is lost."""
    if name in ("fsync", "save_file") and Path(path).is_file():
        os.truncate(path, Path(path).stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def killed(recipe: Path, directory: Path, moment: Moment) -> Callable[[], None]:
    """Make a run, or its continuation, that dies at a moment."""

    def work() -> None:
        patch = pytest.MonkeyPatch()
        if moment[0] == "disk":
            Disk(directory, die, moment[1]).install(patch)
        else:
            at_step(patch, moment[0], moment[1], _die_now)
        go_on(recipe, directory)

    return work


def _die_now(_: PackedTrainer) -> None:
    die("", "")


def go_on(recipe: Path, directory: Path) -> None:
    """Resume the run; start it if it had not begun, or if the error says that no checkpoint was reached."""
    if (directory / "recipe.yaml").exists():
        try:
            train(recipe, directory, *FEW, resume="exact")
        except TrainingError as error:
            # Killed while the first checkpoint took its place: that was undone, and the recipe with it.
            if "no run in it reached its first checkpoint. Leave --resume out" not in str(error):
                raise
        else:
            return
    train(recipe, directory, *FEW)


@pytest.mark.fault("checkpoints: `kill -9` during a save")
def test_a_killed_run_goes_on_to_the_bit(straight: Straight, tmp_path: Path, kill: int) -> None:
    directory, errors = tmp_path / "run", tmp_path / "errors"
    moment = moments(straight.calls)[kill]
    ended = forked(killed(straight.recipe, directory, moment), errors)
    assert ended == -signal.SIGKILL, errors.read_text(encoding="utf-8") if errors.exists() else ended
    if kill % 3 == 2:
        # Once more, while it continues: it may end before that.
        forked(killed(straight.recipe, directory, ("disk", moment[1] % 90)), errors)
    ended = forked(lambda: go_on(straight.recipe, directory), errors)
    assert ended == 0, errors.read_text(encoding="utf-8") if errors.exists() else ended
    assert outcome(directory) == straight.outcome, moment
    # At most an empty directory: its claim goes before it.
    assert not [path for one in directory.rglob(f"{STAGING}*") for path in one.iterdir()]
    assert not [path for path in directory.rglob("*") if path.name in (NEW, EXCHANGE)]


@pytest.mark.fault("checkpoints: `kill -9` during a save")
def test_every_phase_of_a_save_is_among_the_moments(straight: Straight) -> None:
    seen = {straight.calls[number][0] for what, number in moments(straight.calls)[:20] if what == "disk"}
    assert seen == {"mkdir", "open", "save_file", "fsync", "rename", "replace", "unlink", "rmdir"}
