"""What keeps a run out of its `output_dir`: found without torch, and without writing anything."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from lora_llava.recipe.settings import Recipe
from lora_llava.run_directory.output import CHECKPOINTS, DIRECTORIES, FILES, RECIPE
from lora_llava.run_directory.written import EXCHANGE, STATE, Written, is_kits, read_written
from lora_llava.system.files import is_staging, shown_path
from lora_llava.system.text import listed

KEY = "output_dir"


class DirectoryProblem(NamedTuple):
    """Why a run cannot use its directory."""

    where: str
    """Recipe key."""
    what: str
    """What was found; a sentence without its period."""
    fix: str
    """What to do; a sentence."""


def problems_of_output_dir(recipe: Recipe, *, overwrite: bool = False, resume: bool = False) -> list[DirectoryProblem]:
    """Find everything that keeps a run out of its `output_dir`, or an input of it that would be replaced."""
    root = recipe.resolved_output_dir
    if problem := _unusable(root):
        return [problem]
    if not root.is_dir():
        return [_nothing_to_resume(root)] if resume else []
    if (root / STATE / EXCHANGE).is_file():
        # Broken off: the claim, which puts the earlier run back first, looks again.
        return []
    problems = list(_links_to_nothing(root))
    if resume:
        return problems + list(_resume_problems(root))
    inputs = {} if problems else inputs_inside(recipe)
    if overwrite:
        problems += [
            DirectoryProblem(
                key,
                f"{shown_path(path)} lies in output_dir, where --overwrite would replace it",
                "Give another directory with output_dir=PATH, or move it elsewhere and correct the setting.",
            )
            for key, path in inputs.items()
        ]
    written = read_written(root)
    found = found_in(root)
    return problems + list(
        _overwrite_problems(root, found, written) if overwrite else _occupied(root, found, written, inputs)
    )


_KERNELS = (Path("/proc"), Path("/sys"))


def _unusable(root: Path) -> DirectoryProblem | None:
    """Say why a directory cannot be made or written."""
    if root.is_symlink() and not root.exists():
        return DirectoryProblem(KEY, f"{shown_path(root)} is a link to {root.readlink()}, which is not there", _DISK)
    # Not Path.exists(), which raises for what lies below a directory without permission.
    nearest = next(path for path in (root, *root.parents) if os.path.exists(path))  # noqa: PTH110
    if not nearest.is_dir():
        return DirectoryProblem(
            KEY, f"{shown_path(root)} cannot be made: {shown_path(nearest)} is a file", "Give another output_dir=PATH."
        )
    if any(nearest.resolve().is_relative_to(one) for one in _KERNELS):
        return DirectoryProblem(
            KEY,
            f"{shown_path(root)} cannot be made: {shown_path(nearest)} shows the state of the kernel and "
            "holds no files of users",
            "Give another output_dir=PATH.",
        )
    if artifact := next((path for path in (root, *root.parents) if _is_artifact(path)), None):
        return DirectoryProblem(
            KEY,
            f"{shown_path(root)} is in the artifact or checkpoint {shown_path(artifact)}, which a run must not change",
            "Give the run's own directory, or another, with output_dir=PATH.",
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        return DirectoryProblem(
            KEY,
            f"{shown_path(root)} cannot be written: no permission to write to {shown_path(nearest)}",
            "Change its permissions, or give another output_dir=PATH.",
        )
    state = root / STATE
    if os.path.lexists(state) and not is_kits(state):
        return DirectoryProblem(
            KEY, f"{shown_path(root)} holds {STATE}, which the kit did not make", "Move it elsewhere."
        )
    return None


def _is_artifact(directory: Path) -> bool:
    return all(os.path.lexists(directory / name) for name in ("manifest.json", "adapter_config.json"))


_DISK = "Connect the disk that it leads to, or remove the link."


def _links_to_nothing(root: Path) -> Iterator[DirectoryProblem]:
    for name in (CHECKPOINTS, *DIRECTORIES):
        path = root / name
        if path.is_symlink() and not path.exists():
            yield DirectoryProblem(KEY, f"{shown_path(path)} is a link to {path.readlink()}, which is not there", _DISK)
        elif path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
            yield DirectoryProblem(KEY, f"{shown_path(path)} cannot be written", "Change its permissions.")


def _nothing_to_resume(root: Path) -> DirectoryProblem:
    return DirectoryProblem(
        KEY,
        f"--resume: there is nothing to resume in output_dir {shown_path(root)}: no run in it has come to its first "
        "checkpoint",
        "Leave --resume out to start one, or give the right directory with output_dir=PATH.",
    )


def _resume_problems(root: Path) -> Iterator[DirectoryProblem]:
    if not os.path.lexists(root / RECIPE):
        if next((root / CHECKPOINTS).glob("*/step-*"), None) is None:
            yield _nothing_to_resume(root)
        else:
            yield DirectoryProblem(
                KEY,
                f"--resume: {shown_path(root)} holds checkpoints and no {RECIPE}, which says what they were "
                "trained with",
                "Put the file back, or start anew in another directory with output_dir=PATH.",
            )
    for name in FILES:
        path = root / name
        if path.is_symlink() or (path.exists() and not path.is_file()):
            yield DirectoryProblem(
                KEY, f"{shown_path(path)} is no file of its own but a link or a directory", "Put the file back."
            )


def found_in(root: Path) -> dict[str, list[str]]:
    """List what lies where a run writes: by the name of the file or directory, the paths of all files below it."""
    found = {name: [name] for name in FILES if os.path.lexists(root / name)}
    found |= {name: sorted(_below(root, name)) for name in DIRECTORIES}
    if not (root / CHECKPOINTS).is_symlink():
        # Of a whole disk only the stages' directories are the run's; a directory here is one it would have made.
        within = tuple(f"{name}/" for name in DIRECTORIES)
        found[CHECKPOINTS] = [path for path in sorted(_below(root, CHECKPOINTS)) if not path.startswith(within)]
    return {name: paths for name, paths in found.items() if paths}


def _below(root: Path, name: str) -> Iterator[str]:
    """Yield the paths of the files below a directory; what a killed process of the kit left is passed over."""
    if os.path.lexists(root / name) and not (root / name).is_dir():
        yield name
    for directory, subdirectories, files in os.walk(root / name):
        here = Path(directory)
        links = [one for one in subdirectories if (here / one).is_symlink()]
        subdirectories[:] = [one for one in subdirectories if not is_staging(here / one)]
        yield from ((here / one).relative_to(root).as_posix() for one in (*files, *links))


def _occupied(
    root: Path, found: Mapping[str, list[str]], written: Written | None, inputs: Mapping[str, Path]
) -> Iterator[DirectoryProblem]:
    if not found:
        return
    shown, names = shown_path(root), ", ".join(found)
    another = "give another directory with output_dir=PATH"
    if written is not None and any(name in written.versions for paths in found.values() for name in paths):
        what = f"{shown} holds a run already ({names})"
        if inputs:
            inside = listed([f"{key} {shown_path(path)}" for key, path in inputs.items()])
            yield DirectoryProblem(
                KEY, f"{what}, from which this one reads {inside}", f"{another[0].upper()}{another[1:]}."
            )
        else:
            yield DirectoryProblem(KEY, what, f"--resume continues it, --overwrite replaces it; or {another}.")
    elif (root / RECIPE).is_file():
        what = f"{shown} holds a run already ({names}), made before runs kept a list of their files"
        yield DirectoryProblem(KEY, what, f"--resume continues it; to start anew, move it away or {another}.")
    else:
        yield _not_ours(root, list(found))


def _overwrite_problems(
    root: Path, found: Mapping[str, list[str]], written: Written | None
) -> Iterator[DirectoryProblem]:
    if written is None:
        if found and (root / RECIPE).is_file():
            yield DirectoryProblem(
                KEY,
                f"{shown_path(root)} holds {_shown_names(root, found)}, and no list of what a run wrote there, so "
                "--overwrite cannot tell its files from yours",
                f"Move it away: mv {shown_path(root)} {shown_path(root)}.old; or give another output_dir=PATH.",
            )
        elif found:
            yield _not_ours(root, list(found))
        return
    changed = [name for paths in found.values() for name in paths if _is_changed(written, name)]
    for name in changed:
        yield DirectoryProblem(
            KEY,
            f"{shown_path(root / name)} was changed since the run wrote it; --overwrite replaces only what a run wrote",
            "Move it elsewhere, or give another output_dir=PATH.",
        )
    # Strangers' files in a directory that the run made stay in it; a directory without any of its files is not its own.
    foreign = [name for name in found if not any(f"{path}/".startswith(f"{name}/") for path in written.versions)]
    if foreign:
        yield _not_ours(root, foreign)


def _is_changed(written: Written, name: str) -> bool:
    return name in written.versions and not written.is_ours(name)


def _not_ours(root: Path, names: list[str]) -> DirectoryProblem:
    return DirectoryProblem(
        KEY,
        f"{shown_path(root)} holds {_shown_names(root, names)}, which no run of the kit wrote",
        "Give another directory with output_dir=PATH, or move that elsewhere.",
    )


def _shown_names(root: Path, names: Mapping[str, object] | list[str]) -> str:
    return listed([name + "/" * (root / name).is_dir() for name in names])


def inputs_inside(recipe: Recipe) -> dict[str, Path]:
    """Find the recipe's own inputs that lie where the run writes, by their keys."""
    root = recipe.resolved_output_dir
    names = (*FILES, *DIRECTORIES, CHECKPOINTS, STATE)
    taken = [path.resolve() for name in names if (path := root / name).exists() and not _is_disk(root, name)]
    return {
        key: path for key, path in _paths_of(recipe.plain()) if any(path.resolve().is_relative_to(one) for one in taken)
    }


def _is_disk(root: Path, name: str) -> bool:
    return name == CHECKPOINTS and (root / name).is_symlink()


def _paths_of(settings: Mapping[str, object], above: str = "") -> Iterator[tuple[str, Path]]:
    """Yield key and path of every setting that names something on this machine; a loaded recipe's are absolute."""
    for name, value in settings.items():
        key = f"{above}{name}"
        if isinstance(value, dict):
            yield from _paths_of(value, f"{key}.")
        elif isinstance(value, str) and key != KEY and value.startswith("/") and os.path.lexists(value):
            yield key, Path(value)
