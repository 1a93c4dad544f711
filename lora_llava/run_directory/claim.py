"""The claim of a run's directory, which can be undone until the first whole checkpoint.

Until then all that a run writes lies below `.lora-llava/new`, and what `output_dir` holds stays as it is and where it
is. With the first whole checkpoint comes one exchange: files of the earlier run, by its list, move aside; those of the
new one take their names; then the former are removed. The exchange is written down before it begins, so that one that
was broken off is taken back, by this process or by the next that opens the directory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lora_llava.errors import TrainingError
from lora_llava.recipe.settings import Recipe
from lora_llava.run_directory.exchange import Exchange, finish_exchange, run_exchange
from lora_llava.run_directory.lock import is_locked, locked
from lora_llava.run_directory.output import BASE, DIRECTORIES, FEATURES, TRAIN_LOG
from lora_llava.run_directory.problems import found_in, problems_of_output_dir
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

MANIFESTS = ("manifest.json", "checkpoint.json")
"""Files without which a directory is no artifact and no checkpoint: the last to come and the first to leave."""


@contextmanager
def claimed(recipe: Recipe, *, overwrite: bool = False, resume: bool = False) -> Iterator[None]:
    """Claim `output_dir` for the block: for a new run, or to continue the run in it.

    If the block is left before the run has a whole checkpoint, the directory is as it was. Raises TrainingError with
    every problem of the directory.
    """
    root = recipe.resolved_output_dir
    restore(root)
    if problems := problems_of_output_dir(recipe, overwrite=overwrite, resume=resume):
        raise TrainingError("\n".join(f"{where} {what}. {fix}" for where, what, fix in problems))
    if resume:
        yield
        return
    try:
        made = make_directories(root)
        _begin(root)
    except OSError as error:
        raise TrainingError(f"output_dir {shown_path(root)} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        # An exchange that could not even be taken back, on a disk that failed, is left to the next command.
        with suppress(OSError):
            finish_exchange(root)
            if is_pending(root):
                _drop_pending(root)
                remove_empty(made)


def _begin(root: Path) -> None:
    state = make_state(root)
    absent = [name for name in DIRECTORIES if not os.path.lexists(root / name)]
    (state / NEW).mkdir()
    write_text(state / NEW / PENDING, json.dumps({"absent": absent}) + "\n")


def _drop_pending(root: Path) -> None:
    """Remove what a run without a whole checkpoint has written, and the directories that it made."""
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
    """Take back, or finish, what a run that was killed left half done in `root`.

    Raises TrainingError if an exchange that was broken off cannot be taken back.
    """
    state = root / STATE
    if not state.is_dir() or not is_kits(state):
        return
    try:
        finish_exchange(root)
    except OSError as error:
        raise TrainingError(
            f"output_dir {shown_path(root)}: a run was stopped while it replaced the earlier one, which cannot be put "
            f"back: {error.strerror}. Make the directory writable and run the command again; nothing is lost"
        ) from error
    if (state / NEW).exists():
        _drop_pending(root)
    for directory in (root, state, root / FEATURES, *(root / name for name in DIRECTORIES)):
        clear_stale(directory)


def restore_around(directory: Path) -> None:
    """Put back the run of `directory`, an artifact or a checkpoint, if its exchange for another was broken off.

    A run that is at work there is left alone; so is a disk that cannot be written.
    """
    here = directory.absolute()
    for root in (here, *here.parents[:3]):
        if (root / STATE / EXCHANGE).is_file() and not is_locked(root):
            with suppress(TrainingError), locked(root):
                restore(root)


def place(
    root: Path, staged_directory: Path, target: Path, hashes: Mapping[str, str] | None = None, *, first: bool = False
) -> None:
    """Give a whole directory of the run in `root` its name, file by file where the name is taken, and list its files.

    `first`: it is a checkpoint, so that the run may take the place of an earlier one. `hashes`: SHA-256 of its files,
    where they are known. Raises TrainingError if a file of somebody else has one of the names.
    """
    name = target.relative_to(root).as_posix()
    files = {f"{name}/{path.relative_to(staged_directory).as_posix()}": path for path in _files(staged_directory)}
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
    """Rename a whole directory to `target`; or, where that is there, its files one by one, a manifest last."""
    if not os.path.lexists(target):
        staged_directory.rename(target)
        return
    for path in _files(staged_directory):
        destination = target / path.relative_to(staged_directory)
        destination.parent.mkdir(parents=True, exist_ok=True)
        path.replace(destination)
    fsync(target)


def _files(directory: Path) -> list[Path]:
    found = [path for path in directory.rglob("*") if not path.is_dir() or path.is_symlink()]
    return sorted(found, key=lambda path: (path.name in MANIFESTS, path))


def _refuse_foreign(root: Path, names: Iterable[str]) -> None:
    written = read_written(root)
    there = [name for name in names if os.path.lexists(root / name)]
    if foreign := [name for name in there if written is None or not written.is_ours(name)]:
        raise TrainingError(
            f"{shown_path(root / foreign[0])} is in the way: the run did not write it, or it was changed since. Move "
            "it elsewhere"
        )


def _note_log(root: Path) -> None:
    log = current(root) / TRAIN_LOG
    if log.is_file() and not log.is_symlink():
        note(root, [version_of(log, TRAIN_LOG, grows=True)])


def _exchange(root: Path, checkpoint: Mapping[str, Path]) -> None:
    """Put the run with its first checkpoint, whose files are still aside, into the place of the earlier one."""
    new = root / STATE / NEW
    own = {path.relative_to(new).as_posix(): path for path in _files(new) if path.name not in (PENDING, LIST)}
    # Small files were listed when they were written; what a tracker left grows, and has names that no run repeats.
    note_all(root, {name: path for name, path in own.items() if name.startswith(f"{BASE}/")})
    _note_log(root)
    written = read_written(root)
    leaving = sorted(written.present(), key=lambda name: Path(name).name not in MANIFESTS) if written else []
    if written is not None:
        # A directory in which files of the user stay is still one that a run made.
        shared = [name for names in found_in(root).values() if set(names) - set(leaving) for name in names]
        note(root, [one for name in shared for one in written.versions.get(name, [])])
    with ExitStack() as stack:
        sources = {name: _on_disk_of(root, name, path, stack) for name, path in own.items()}
        exchange = Exchange.plan(
            root,
            leaving=leaving,
            coming={f"{STATE}/{LIST}": new / LIST, **sources, **checkpoint},
        )
        run_exchange(root, exchange)
    shutil.rmtree(new, ignore_errors=True)


def _on_disk_of(root: Path, name: str, path: Path, stack: ExitStack) -> Path:
    """Return a file of the new run where a rename can reach its place: copied first if that is on another disk."""
    parent = next(one for one in (root / name).parents if one.is_dir())
    if parent.stat().st_dev == path.stat().st_dev:
        return path
    copied = stack.enter_context(staging_in(parent)) / path.name
    shutil.copy2(path, copied)
    fsync(copied)
    return copied
