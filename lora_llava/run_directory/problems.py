"""Find what keeps a run from using its `output_dir`, without torch and without writing anything."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from lora_llava.run_directory.lock import is_locked_elsewhere
from lora_llava.run_directory.output import CHECKPOINTS, DIRECTORIES, FILES, RECIPE
from lora_llava.run_directory.written import EXCHANGE, STATE, Written, is_kits, read_written
from lora_llava.system.files import is_staging, shown_path
from lora_llava.system.text import listed

_KEY = "output_dir"
_KERNELS = (Path("/proc"), Path("/sys"))
_RECONNECT = "Connect the disk that it leads to, or remove the link."


class DirectoryProblem(NamedTuple):
    """Why a run cannot use its directory."""

    what: str
    """What is wrong: a sentence without its period."""
    fix: str
    """What to do: a sentence."""
    where: str = _KEY
    """Recipe key."""


def problems_of_output_dir(
    root: Path, settings: Mapping[str, object], *, overwrite: bool = False, resume: bool = False
) -> list[DirectoryProblem]:
    """Find everything that keeps a run from using `root` as its `output_dir`, inputs inside it included.

    `settings`: the recipe as plain values.
    """
    if problem := unusable(root):
        return [problem]
    if not root.is_dir():
        return [_nothing_to_resume(root)] if resume else []
    if is_locked_elsewhere(root):
        fix = "Wait until it ends, or stop it" + (
            "." if resume else "; or give another directory with output_dir=PATH."
        )
        return [DirectoryProblem(f"{shown_path(root)} is in use by another run", fix)]
    if (root / STATE / EXCHANGE).is_file():
        # Interrupted: the claim restores the earlier run and looks again.
        return []
    problems = list(_broken_links(root))
    if resume:
        return problems + list(_resume_problems(root))
    inputs = {} if problems else _inputs_inside(root, settings)
    if overwrite:
        problems += [
            DirectoryProblem(
                f"{shown_path(path)} is in output_dir, where --overwrite would replace it",
                "Give another directory with output_dir=PATH, or move it elsewhere and correct the setting.",
                key,
            )
            for key, path in inputs.items()
        ]
    written = read_written(root)
    existing = files_of_runs(root)
    return problems + list(
        _overwrite_problems(root, existing, written) if overwrite else _occupied(root, existing, written, inputs)
    )


def unusable(root: Path) -> DirectoryProblem | None:
    """Return why a directory cannot be created or written; None if it can."""
    if root.is_symlink() and not root.exists():
        return DirectoryProblem(f"{shown_path(root)} is a link to {root.readlink()}, which does not exist", _RECONNECT)
    # Path.exists() raises below a directory without permission.
    nearest = next(path for path in (root, *root.parents) if os.path.exists(path))  # noqa: PTH110
    if not nearest.is_dir():
        return DirectoryProblem(
            f"{shown_path(root)} cannot be created: {shown_path(nearest)} is a file",
            "Give another output_dir=PATH.",
        )
    if any(nearest.resolve().is_relative_to(mount) for mount in _KERNELS):
        return DirectoryProblem(
            f"{shown_path(root)} cannot be created: {shown_path(nearest)} is a view of the kernel and "
            "holds no user files",
            "Give another output_dir=PATH.",
        )
    if artifact := next((path for path in (root, *root.parents) if _is_artifact(path)), None):
        return DirectoryProblem(
            f"{shown_path(root)} is in the artifact or checkpoint {shown_path(artifact)}, which a run must not change",
            "Give the run's own directory, or another, with output_dir=PATH.",
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        return DirectoryProblem(
            f"{shown_path(root)} cannot be written: no permission to write to {shown_path(nearest)}",
            "Change its permissions, or give another output_dir=PATH.",
        )
    state = root / STATE
    if os.path.lexists(state) and not is_kits(state):
        return DirectoryProblem(f"{shown_path(root)} holds {STATE}, which the kit did not make", "Move it elsewhere.")
    return None


def _is_artifact(directory: Path) -> bool:
    return all(os.path.lexists(directory / name) for name in ("manifest.json", "adapter_config.json"))


def _broken_links(root: Path) -> Iterator[DirectoryProblem]:
    for name in (CHECKPOINTS, *DIRECTORIES):
        path = root / name
        if path.is_symlink() and not path.exists():
            yield DirectoryProblem(
                f"{shown_path(path)} is a link to {path.readlink()}, which does not exist", _RECONNECT
            )
        elif path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
            yield DirectoryProblem(f"{shown_path(path)} cannot be written", "Change its permissions.")


def _nothing_to_resume(root: Path) -> DirectoryProblem:
    return DirectoryProblem(
        f"--resume: there is nothing to resume in output_dir {shown_path(root)}: no run in it reached its first "
        "checkpoint",
        "Leave --resume out to start one, or give the right directory with output_dir=PATH.",
    )


def _resume_problems(root: Path) -> Iterator[DirectoryProblem]:
    if not os.path.lexists(root / RECIPE):
        if next((root / CHECKPOINTS).glob("*/step-*"), None) is None:
            yield _nothing_to_resume(root)
        else:
            yield DirectoryProblem(
                f"--resume: {shown_path(root)} holds checkpoints but no {RECIPE}, which says what they were "
                "trained with",
                "Put the file back, or start a new run in another directory with output_dir=PATH.",
            )
    for name in FILES:
        path = root / name
        if path.is_symlink() or (path.exists() and not path.is_file()):
            yield DirectoryProblem(f"{shown_path(path)} is a link or a directory, not a file", "Put the file back.")


def files_of_runs(root: Path) -> dict[str, list[str]]:
    """List the files where a run writes: for the name of each file or directory, the paths of all files below it."""
    existing = {name: [name] for name in FILES if os.path.lexists(root / name)}
    existing |= {name: sorted(_below(root, name)) for name in DIRECTORIES}
    if not (root / CHECKPOINTS).is_symlink():
        # If it is a link, as to another disk, only the directories of the stages are the run's.
        within = tuple(f"{name}/" for name in DIRECTORIES)
        existing[CHECKPOINTS] = [path for path in sorted(_below(root, CHECKPOINTS)) if not path.startswith(within)]
    return {name: paths for name, paths in existing.items() if paths}


def _below(root: Path, name: str) -> Iterator[str]:
    """Yield the paths of the files below a directory, without the staging directories of killed processes."""
    if os.path.lexists(root / name) and not (root / name).is_dir():
        yield name
    for directory, subdirectories, files in os.walk(root / name):
        parent = Path(directory)
        links = [child for child in subdirectories if (parent / child).is_symlink()]
        subdirectories[:] = [child for child in subdirectories if not is_staging(parent / child)]
        yield from ((parent / child).relative_to(root).as_posix() for child in (*files, *links))


def _occupied(
    root: Path, existing: Mapping[str, list[str]], written: Written | None, inputs: Mapping[str, Path]
) -> Iterator[DirectoryProblem]:
    if not existing:
        return
    shown, names = shown_path(root), ", ".join(existing)
    another = "give another directory with output_dir=PATH"
    if written is not None and any(name in written.versions for paths in existing.values() for name in paths):
        what = f"{shown} holds a run already ({names})"
        if inputs:
            inside = listed([f"{key} {shown_path(path)}" for key, path in inputs.items()])
            yield DirectoryProblem(f"{what}, from which this one reads {inside}", f"{another[0].upper()}{another[1:]}.")
        else:
            yield DirectoryProblem(what, f"--resume continues it, --overwrite replaces it; or {another}.")
    elif (root / RECIPE).is_file():
        what = f"{shown} holds a run already ({names}), of a version that did not list its files"
        yield DirectoryProblem(what, f"--resume continues it; to start a new run, move it away or {another}.")
    else:
        yield _not_ours(root, list(existing))


def _overwrite_problems(
    root: Path, existing: Mapping[str, list[str]], written: Written | None
) -> Iterator[DirectoryProblem]:
    if written is None:
        if existing and (root / RECIPE).is_file():
            yield DirectoryProblem(
                f"{shown_path(root)} holds {_shown_names(root, existing)}, and no list of what a run wrote there, so "
                "--overwrite cannot tell its files from yours",
                f"Move it away: mv {shlex.join((shown_path(root), f'{shown_path(root)}.old'))}; or give another "
                "output_dir=PATH.",
            )
        elif existing:
            yield _not_ours(root, list(existing))
        return
    names = [name for paths in existing.values() for name in paths]
    changed = [name for name in names if name in written.versions and not written.is_ours(name)]
    for name in changed:
        yield DirectoryProblem(
            f"{shown_path(root / name)} was changed since the run wrote it; --overwrite replaces only what a run wrote",
            "Move it elsewhere, or give another output_dir=PATH.",
        )
    # Other files in a directory that a run made may stay in it; a directory without a file of a run is not a run's.
    foreign = [name for name in existing if not any(f"{path}/".startswith(f"{name}/") for path in written.versions)]
    if foreign:
        yield _not_ours(root, foreign)


def _not_ours(root: Path, names: list[str]) -> DirectoryProblem:
    return DirectoryProblem(
        f"{shown_path(root)} holds {_shown_names(root, names)}, which no run of the kit wrote",
        "Give another directory with output_dir=PATH, or move that elsewhere.",
    )


def _shown_names(root: Path, names: Mapping[str, object] | list[str]) -> str:
    return listed([f"{name}/" if (root / name).is_dir() else name for name in names])


def _inputs_inside(root: Path, settings: Mapping[str, object]) -> dict[str, Path]:
    """Find the recipe's own inputs where the run writes, by their keys."""
    names = [*FILES, *DIRECTORIES, STATE]
    if not (root / CHECKPOINTS).is_symlink():
        names.append(CHECKPOINTS)
    outputs = [path.resolve() for name in names if (path := root / name).exists()]
    return {
        key: path
        for key, path in _paths_in(settings)
        if any(path.resolve().is_relative_to(output) for output in outputs)
    }


def _paths_in(settings: Mapping[str, object], above: str = "") -> Iterator[tuple[str, Path]]:
    """Yield key and path of every setting that is an existing path; those of a loaded recipe are absolute."""
    for name, value in settings.items():
        key = f"{above}{name}"
        # Several sources are a list, in which errors give no number to the first.
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            where = f"{key}.{index}" if index else key
            if isinstance(item, dict):
                yield from _paths_in(item, f"{where}.")
            elif isinstance(item, str) and where != _KEY and item.startswith("/") and os.path.lexists(item):
                yield where, Path(item)
