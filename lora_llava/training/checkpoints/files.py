"""Checkpoint directories: each is complete or absent, and is verified before it is used.

`checkpoints/STAGE/step-N` is an artifact (see `lora_llava.artifact`) together with the state of the training. Its
manifest, `checkpoint.json`, is written last and holds the size and SHA-256 of every file; the directory is renamed to
its final name once everything is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_llava.errors import TrainingError
from lora_llava.recipe.stages import StageName
from lora_llava.system.files import clear_stale, file_sha256, refuse_irregular, shown_path, staged

MANIFEST = "checkpoint.json"
FORMAT = 1
"""Version of the manifest; a reader refuses a newer one."""

_PICKLED = (".pt", ".pth", ".bin", ".pkl")
_NAME = re.compile(r"step-(\d+)")


class DamagedCheckpointError(TrainingError):
    """A checkpoint lacks a file, or a file differs from the manifest."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a stage that the trainer, the optimizer and the RNGs do not save themselves."""

    stage: StageName
    step: int
    eval_loss: float | None
    """Validation loss at this step, if it was measured."""
    loss_sum: float
    """Sum of the losses of the steps since the last line of the log."""
    loss_total: float
    """Sum of the losses of the steps before."""
    last_logged_step: int
    log_bytes: int
    """Size of the run's log; resuming truncates the log to it."""
    log_seconds: float
    """Seconds since the first step, as logged; like the next two, over all sessions."""
    seconds: float
    """Time spent on the stage."""
    saving_seconds: float
    """Time spent on the checkpoints before this one."""
    num_saved: int
    """Checkpoints saved, this one included."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was read, and the facts that the run which wrote it depends on."""

    directory: Path
    progress: Progress
    memory_plan: dict[str, Any]
    facts: dict[str, Any]
    resumable: bool = True
    """Whether it includes the state of the training; otherwise it only holds the weights of the best validation."""


def write_checkpoint(
    parent: Path,
    progress: Progress,
    memory_plan: dict[str, Any],
    facts: dict[str, Any],
    write: Callable[[Path, Path], None],
    place: Callable[[Path, Path, Mapping[str, str]], None],
    *,
    resumable: bool = True,
) -> Path:
    """Write a checkpoint below `parent` and return its directory.

    `write` gets the directory to write to and the final directory; `place` moves the one to the other, and also gets
    the SHA-256 of its files. `resumable`: whether it includes the state of the training.
    """
    directory = parent / f"step-{progress.step}"
    files: dict[str, dict[str, Any]] = {}

    def place_listed(staging: Path, target: Path) -> None:
        place(staging, target, {name: entry["sha256"] for name, entry in files.items()})

    with staged(directory, place_listed) as staging:
        write(staging, directory)
        for path in sorted(staging.iterdir()):
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        content = {
            "format": FORMAT,
            "progress": asdict(progress),
            "memory_plan": memory_plan,
            "facts": facts,
            "files": files,
        } | ({} if resumable else {"resumable": False})
        (staging / MANIFEST).write_text(_signed(content), encoding="utf-8")
    return directory


def read_verified(directory: Path) -> Checkpoint:
    """Verify every file of a checkpoint and read it; DamagedCheckpointError names the first file that differs."""
    refuse_irregular(directory, DamagedCheckpointError)
    checkpoint, files = _read(directory)
    present = _file_names(directory) - {MANIFEST}
    # The kit pickles nothing, but a library might load a pickle from this directory.
    if strays := sorted(name for name in present - files.keys() if name.endswith(_PICKLED)):
        raise DamagedCheckpointError(f"it holds {strays[0]}, which the kit did not write; remove that file")
    for name, facts in files.items():
        path = directory / name
        if name not in present:
            raise DamagedCheckpointError(f"{name} is missing")
        if (size := path.stat().st_size) != facts["bytes"]:
            raise DamagedCheckpointError(f"{name} has {size:,} bytes, not {facts['bytes']:,}")
        if _sha256(path) != facts["sha256"]:
            raise DamagedCheckpointError(f"{name} was altered: its sha256 is not the one in {MANIFEST}")
    return checkpoint


def find_latest(parent: Path, say: Callable[[str], object]) -> Checkpoint | None:
    """Find the newest undamaged checkpoint below `parent` to resume from; None if none was ever written.

    Reports damaged ones through `say`. Raises TrainingError if all are damaged.
    """
    if not parent.is_dir():
        return None
    clear_stale(parent)
    damaged: list[str] = []
    for directory in reversed(_directories(parent)):
        try:
            checkpoint = read_verified(directory)
        except DamagedCheckpointError as error:
            damaged.append(f"{shown_path(directory)} is damaged ({error})")
            continue
        if not checkpoint.resumable:
            continue
        for line in damaged:
            say(f"{line}; resuming from {directory.name} instead")
        return checkpoint
    if damaged:
        raise TrainingError(
            f"no whole checkpoint is left: {'; '.join(damaged)}. Restore one from a backup, or remove "
            f"{shown_path(parent)} to start the stage from its beginning."
        )
    return None


def remove_later(parent: Path, step: int) -> None:
    """Remove the checkpoints after `step`: those of an earlier session that a resumed one does not continue from.

    They are damaged, or hold only the weights of a validation that is repeated. If one stayed, `prune` could take it
    for the best and remove the best of this session.
    """
    for directory in _directories(parent):
        if _step(directory) > step:
            _remove_checkpoint(directory)


def prune(parent: Path, step: int, limit: int) -> None:
    """Remove old checkpoints, down to `limit`, after the one of `step` was written.

    That one and the best by validation loss stay. The best one does not count toward the limit if it only holds
    weights, since nothing could be resumed from it.
    """
    readable = list(_readable(parent))
    losses = [(read.progress.eval_loss, read.directory) for read in readable if read.progress.eval_loss is not None]
    best = [directory for _, directory in sorted(losses, key=lambda pair: pair[0])[:1]]
    resumable = [read.directory for read in readable if read.resumable]
    # The most valuable first.
    ranked = [parent / f"step-{step}", *(directory for directory in best if directory in resumable)]
    staying = [*list(dict.fromkeys([*ranked, *reversed(resumable)]))[:limit], *best]
    for directory in _directories(parent):
        if directory not in staying:
            _remove_checkpoint(directory)


def _remove_checkpoint(directory: Path) -> None:
    """Remove the files of a checkpoint, and its directory if it holds nothing else.

    The manifest lists the files and is removed first, so that no partial checkpoint looks complete. If it cannot be
    read, the manifest of a neighbor gives the names, which are the same. What is not in the directory itself stays,
    whatever a manifest says.
    """
    names: set[str] = set()
    for neighbor in (directory, *_directories(directory.parent)):
        with suppress(TrainingError):
            names = set(_read(neighbor)[1])
            break
    if directory.is_dir():
        for name in (MANIFEST, *sorted(names & _file_names(directory))):
            (directory / name).unlink(missing_ok=True)
        with suppress(OSError):
            directory.rmdir()


def best_loss(parent: Path, until: int) -> float | None:
    """Return the lowest validation loss of the checkpoints below `parent` up to step `until`."""
    progresses = [checkpoint.progress for checkpoint in _readable(parent) if checkpoint.progress.step <= until]
    return min((progress.eval_loss for progress in progresses if progress.eval_loss is not None), default=None)


def _readable(parent: Path) -> Iterator[Checkpoint]:
    """Yield the checkpoints with a readable manifest, ordered by step."""
    for directory in _directories(parent):
        try:
            yield _read(directory)[0]
        except DamagedCheckpointError:
            continue


def _file_names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.is_file()}


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise DamagedCheckpointError(f"{path.name} cannot be read: {error.strerror}") from error


def _directories(parent: Path) -> list[Path]:
    """List the directories named like checkpoints, ordered by step."""
    paths = parent.iterdir() if parent.is_dir() else ()
    return sorted((path for path in paths if _NAME.fullmatch(path.name) and path.is_dir()), key=_step)


def _step(directory: Path) -> int:
    match = _NAME.fullmatch(directory.name)
    assert match is not None
    return int(match[1])


def _signed(content: dict[str, Any]) -> str:
    """Serialize a manifest with its own SHA-256 as the last entry."""
    digest = hashlib.sha256(json.dumps(content, indent=2).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=2) + "\n"


def _read(directory: Path) -> tuple[Checkpoint, dict[str, dict[str, Any]]]:
    """Read the manifest, which must match its own SHA-256, and the files that it lists."""
    path = directory / MANIFEST
    if not path.is_file():
        raise DamagedCheckpointError(f"{MANIFEST} is missing: it was not written to its end")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        del content["sha256"]
        if content["format"] > FORMAT:
            raise TrainingError(f"{path}: format {content['format']} is newer than this program's {FORMAT}; update it")
        whole = _signed(content) == text
        progress, resumable = Progress(**content["progress"]), content.get("resumable", True)
        checkpoint = Checkpoint(directory, progress, content["memory_plan"], content["facts"], resumable)
        files = content["files"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DamagedCheckpointError(f"{MANIFEST} cannot be read") from error
    if not whole or _step(directory) != checkpoint.progress.step:
        raise DamagedCheckpointError(f"{MANIFEST} was altered")
    return checkpoint, files
