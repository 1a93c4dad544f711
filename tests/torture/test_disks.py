"""A disk that fills up, or can no longer be written, in the middle of a run: said, and nothing lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lora_llava.errors import TrainingError
from lora_llava.training.checkpoints.files import find_latest
from lora_llava.training.trainer import PackedTrainer
from tests.helpers.disk import Disk, full, read_only
from tests.helpers.resuming import at_step, outcome, train
from tests.torture.conftest import FEW, Straight

Remount = Callable[[str], bool]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Remount]]:
    """A directory that is a separate file system, and what mounts it with other options; false if neither may be."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", *options, "tmpfs", str(place)]
        return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0

    mounted = mount("size=64m")
    yield place, lambda options: mounted and mount(f"remount,{options}")
    if mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.fault("checkpoints: a full disk during a save")
@pytest.mark.fault("checkpoints: an output directory that cannot be written")
@pytest.mark.parametrize(
    ("options", "act", "words", "stage", "step", "saved"),
    [
        ("ro", read_only, "Read-only file system", "align", 4, 2),
        # Of step 3 only the weights were saved, for their validation loss.
        ("size={}k", full, "No space left on device", "instruct", 4, 2),
    ],
    ids=["read-only", "full"],
)
def test_a_disk_that_cannot_be_written(
    straight: Straight,
    small_disk: tuple[Path, Remount],
    options: str,
    act: Callable[[str, str], None],
    words: str,
    stage: str,
    step: int,
    saved: int,
) -> None:
    place, remount = small_disk
    directory = place / "run"
    patch = pytest.MonkeyPatch()

    def fail(_: PackedTrainer) -> None:
        used = (os.statvfs(place).f_blocks - os.statvfs(place).f_bfree) * os.statvfs(place).f_frsize // 1024
        # Room for a few files more, not for a checkpoint.
        if not remount(options.format(used + 16)):
            Disk(directory, act, 3).install(patch)

    at_step(patch, stage, step, fail)
    with pytest.raises(TrainingError, match=words) as error:
        train(straight.recipe, directory, *FEW)
    patch.undo()
    assert "MiB are free there" in str(error.value)
    assert f"then resume with: lora-llava finetune {directory / 'recipe.yaml'} --resume" in str(error.value)
    remount("rw,size=64m")
    found = find_latest(directory / "checkpoints" / stage, lambda line: pytest.fail(line))
    assert found is not None and found.progress.step == saved
    train(straight.recipe, directory, *FEW, resume="exact")
    assert outcome(directory) == straight.outcome
