"""Claim a run's directory; the claim can be undone until the first complete checkpoint.

Until then everything that a run writes is below `.lora-llava/new`, and the other contents of `output_dir` do not
change. The first complete checkpoint brings one exchange: the listed files of the earlier run move aside, those of the
new run take their names, and the files aside are deleted. The exchange is recorded before it begins, so that this
process, or the next one that opens the directory, can undo an interrupted one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lora_llava.errors import ArtifactError, TrainingError
from lora_llava.formats.manifest import MANIFEST
from lora_llava.run_directory.exchange import Exchange, finish_exchange, run_exchange
from lora_llava.run_directory.lock import is_locked, locked
from lora_llava.run_directory.output import BASE, DIRECTORIES, FEATURES, TRAIN_LOG
from lora_llava.run_directory.problems import files_of_runs, problems_of_output_dir
from lora_llava.run_directory.written import (
    EXCHANGE,
    LIST,
    NEW,
    PENDING,
    STATE,
    current,
    is_kits,
    is_pending,
    make_state,
    note,
    note_all,
    read_written,
    version_of,
)
from lora_llava.system.files import (
    clear_stale,
    fsync,
    make_directories,
    remove_empty,
    shown_path,
    staging_in,
    write_text,
)

_MANIFESTS = ("manifest.json", "checkpoint.json")
"""Files without which a directory is no artifact and no checkpoint: written last and removed first."""


@contextmanager
def claimed(
    root: Path, settings: Mapping[str, object], *, overwrite: bool = False, resume: bool = False
) -> Iterator[None]:
    """Claim `root`, the `output_dir` of a run, for the block: for a new run, or to resume the run in it.

    `settings`: the recipe as plain values, whose paths must not be overwritten. If the block ends before the first
    complete checkpoint, the directory is restored. Raises TrainingError with every problem of the directory.
    """
    restore(root)
    if problems := problems_of_output_dir(root, settings, overwrite=overwrite, resume=resume):
        raise TrainingError("\n".join(f"{where} {what}. {fix}" for what, fix, where in problems))
    if resume:
        yield
        return
    try:
        created = make_directories(root)
        _begin(root)
    except OSError as error:
        raise TrainingError(f"output_dir {shown_path(root)} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        # If the disk failed, so that not even an exchange can be undone, the next command does it.
        with suppress(OSError):
            finish_exchange(root)
            if is_pending(root):
                _drop_pending(root)
                remove_empty(created)


def _begin(root: Path) -> None:
    state = make_state(root)
    absent = [name for name in DIRECTORIES if not os.path.lexists(root / name)]
    (state / NEW).mkdir()
    write_text(state / NEW / PENDING, json.dumps({"absent": absent}) + "\n")


def _drop_pending(root: Path) -> None:
    """Remove what a run without a complete checkpoint wrote, and the directories that it created."""
    new = root / STATE / NEW
    absent: list[str] = []
    with suppress(OSError, ValueError, KeyError):
        absent = json.loads((new / PENDING).read_text(encoding="utf-8"))["absent"]
    for name in DIRECTORIES:
        clear_stale(root / name)
    remove_empty([root / name for name in absent])
    shutil.rmtree(new, ignore_errors=True)
    if not (root / STATE / LIST).exists():
        shutil.rmtree(root / STATE, ignore_errors=True)


def restore(root: Path) -> None:
    """Undo, or finish, what a killed run left half done in `root`.

    Raises TrainingError if an interrupted exchange cannot be undone.
    """
    state = root / STATE
    if not state.is_dir() or not is_kits(state):
        return
    try:
        finish_exchange(root)
    except OSError as error:
        raise TrainingError(
            f"output_dir {shown_path(root)}: a run was stopped while it replaced an earlier one, which cannot be put "
            f"back: {error.strerror}. Make the directory writable and run the command again; nothing is lost"
        ) from error
    if (state / NEW).exists():
        _drop_pending(root)
    for directory in (root, state, root / FEATURES, *(root / name for name in DIRECTORIES)):
        clear_stale(directory)


def restore_around(directory: Path) -> None:
    """Put back the run that `directory`, an artifact or a checkpoint, belongs to, if its exchange was interrupted.

    Leave a directory alone whose run is at work, or whose disk cannot be written.
    """
    absolute = directory.absolute()
    for root in (absolute, *absolute.parents[:3]):
        if (root / STATE / EXCHANGE).is_file() and not is_locked(root):
            with suppress(TrainingError), locked(root):
                restore(root)


def is_artifact(directory: Path) -> bool:
    """Tell whether a directory is an artifact or a whole model; ArtifactError if it is neither."""
    restore_around(directory)
    if (directory / MANIFEST).is_file():
        return True
    if (directory / "config.json").is_file():
        return False
    raise ArtifactError(
        f"{directory} is neither an artifact (it has no {MANIFEST}) nor a model (no config.json). Give the directory "
        "of a stage, such as runs/NAME/instruct, or of a merged model. Convert adapters and checkpoints of other "
        "tools with: lora-llava import"
    )


def require_artifact(directory: Path) -> None:
    """Raise ArtifactError for a directory that is no artifact."""
    restore_around(directory)
    if not (directory / MANIFEST).is_file():
        raise ArtifactError(
            f"{directory} is not an artifact: it has no {MANIFEST}. Give the directory of a stage, such as "
            "runs/NAME/instruct."
        )


def place(
    root: Path, staged_directory: Path, target: Path, hashes: Mapping[str, str] | None = None, *, first: bool = False
) -> None:
    """Move a complete directory of the run in `root` to `target`, file by file if that exists, and list its files.

    `first`: it is a checkpoint, with which the run may replace an earlier one. `hashes`: known SHA-256 of its files.
    Raises TrainingError if another program's file has one of the names.
    """
    name = target.relative_to(root).as_posix()
    files = {f"{name}/{path.relative_to(staged_directory).as_posix()}": path for path in _files_in(staged_directory)}
    if not first:
        _refuse_foreign(root, files)
    known = {f"{name}/{key}": value for key, value in (hashes or {}).items()}
    note_all(root, files, known)
    if is_pending(root):
        _exchange(root, files)
        return
    _note_log(root)
    move_into(staged_directory, target)


def move_into(staged_directory: Path, target: Path) -> None:
    """Rename a complete directory to `target`; or, if that exists, move its files one by one, manifests last."""
    if not os.path.lexists(target):
        staged_directory.rename(target)
        return
    for path in _files_in(staged_directory):
        destination = target / path.relative_to(staged_directory)
        destination.parent.mkdir(parents=True, exist_ok=True)
        path.replace(destination)
    fsync(target)


def _files_in(directory: Path) -> list[Path]:
    """List the files below a directory, manifests last."""
    paths = [path for path in directory.rglob("*") if not path.is_dir() or path.is_symlink()]
    return sorted(paths, key=lambda path: (path.name in _MANIFESTS, path))


def _refuse_foreign(root: Path, names: Iterable[str]) -> None:
    written = read_written(root)
    existing = [name for name in names if os.path.lexists(root / name)]
    if foreign := [name for name in existing if written is None or not written.is_ours(name)]:
        raise TrainingError(
            f"{shown_path(root / foreign[0])} is in the way: the run did not write it, or it was changed since. Move "
            "it elsewhere"
        )


def _note_log(root: Path) -> None:
    log = current(root) / TRAIN_LOG
    if log.is_file() and not log.is_symlink():
        note(root, [version_of(log, TRAIN_LOG, grows=True)])


def _exchange(root: Path, checkpoint: Mapping[str, Path]) -> None:
    """Replace the earlier run by the new one and its first checkpoint, whose staged files are given by final path."""
    # Small files were listed when they were written. Tracker files are not listed: they grow, and no run reuses their
    # names.
    new = root / STATE / NEW
    own = {path.relative_to(new).as_posix(): path for path in _files_in(new) if path.name not in (PENDING, LIST)}
    note_all(root, {name: path for name, path in own.items() if name.startswith(f"{BASE}/")})
    _note_log(root)

    # The earlier run's unchanged files leave, manifests first. A directory in which files of the user remain stays
    # listed as one that a run made.
    written = read_written(root)
    leaving = sorted(written.present(), key=lambda name: Path(name).name not in _MANIFESTS) if written else []
    if written is not None:
        shared = [name for names in files_of_runs(root).values() if set(names) - set(leaving) for name in names]
        note(root, [version for name in shared for version in written.versions.get(name, [])])

    with ExitStack() as stack:
        sources = {name: _on_disk_of(root, name, path, stack) for name, path in own.items()}
        coming = {f"{STATE}/{LIST}": new / LIST, **sources, **checkpoint}
        run_exchange(root, Exchange.plan(root, leaving=leaving, coming=coming))
    shutil.rmtree(new, ignore_errors=True)


def _on_disk_of(root: Path, name: str, path: Path, stack: ExitStack) -> Path:
    """Return a file of the new run on the disk of its destination, copied there if needed: a rename needs one disk."""
    parent = next(parent for parent in (root / name).parents if parent.is_dir())
    if parent.stat().st_dev == path.stat().st_dev:
        return path
    copied = stack.enter_context(staging_in(parent)) / path.name
    shutil.copy2(path, copied)
    fsync(copied)
    return copied
