"""Replace one run by another with renames that are recorded first, so that all of them happen or none."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_llava.errors import TrainingError
from lora_llava.run_directory.written import EXCHANGE, LIST, STATE
from lora_llava.system.files import STAGING, fsync, is_elsewhere, remove_empty, shown_path, write_text


@dataclass(frozen=True, slots=True)
class Exchange:
    """Renames in their order; paths are relative to the run's directory."""

    leaving: list[tuple[str, str]]
    """Files of the earlier run: current path, path aside."""
    coming: list[tuple[str, str, int]]
    """Files of the new run: current path, final path, inode."""
    made: list[str]
    """Directories created for it, outermost first."""
    done: bool = False

    @classmethod
    def plan(cls, root: Path, leaving: Iterable[str], coming: Mapping[str, Path]) -> Exchange:
        """Plan an exchange: files `leaving` move aside, files `coming` move to the paths that are their keys."""
        aside = f"{STAGING}previous-{secrets.token_hex(6)}"
        names = [*leaving, *([f"{STATE}/{LIST}"] if (root / STATE / LIST).exists() else [])]
        out = [(name, _aside(root, name, aside)) for name in names]
        into = [(os.path.relpath(path, root), name, path.lstat().st_ino) for name, path in coming.items()]
        targets = [*(root / name for _, name in out), *(root / name for _, name, _ in into)]
        missing = {parent for path in targets for parent in path.parents if not parent.exists()}
        made = sorted((os.path.relpath(path, root) for path in missing), key=lambda name: (name.count("/"), name))
        return cls(out, into, made)

    @classmethod
    def read(cls, root: Path) -> Exchange | None:
        """Read the recorded exchange; None if there is none."""
        path = root / STATE / EXCHANGE
        if not path.is_file():
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            [(source, target) for source, target in content["leaving"]],
            [(source, target, inode) for source, target, inode in content["coming"]],
            content["made"],
            content["done"],
        )

    def write(self, root: Path, *, done: bool) -> None:
        """Record the exchange."""
        write_text(root / STATE / EXCHANGE, json.dumps({**asdict(self), "done": done}, indent=1) + "\n")

    @property
    def renames(self) -> list[tuple[str, str]]:
        """All renames, in their order."""
        return [*self.leaving, *((source, target) for source, target, _ in self.coming)]


def _aside(root: Path, name: str, aside: str) -> str:
    """Return the path aside of a file: on the same disk, to which a link of the user's may lead."""
    parts = Path(name).parts
    anchor = next((depth for depth in range(len(parts) - 1, 0, -1) if is_elsewhere(root.joinpath(*parts[:depth]))), 0)
    return Path(*parts[:anchor], aside, *parts[anchor:]).as_posix()


def run_exchange(root: Path, exchange: Exchange) -> None:
    """Rename everything, then delete the files aside. On an error undo all renames and raise it."""
    exchange.write(root, done=False)
    try:
        for name in exchange.made:
            (root / name).mkdir(exist_ok=True)
        for source, target in exchange.renames:
            if os.path.lexists(root / target):
                raise TrainingError(f"{shown_path(root / target)} is in the way: no run of the kit wrote it; move it")
            (root / source).rename(root / target)
        _flush(root, exchange)
        exchange.write(root, done=True)
    except BaseException:
        _undo(root, exchange)
        raise
    _remove_aside(root, exchange)


def finish_exchange(root: Path) -> None:
    """Finish an interrupted exchange if only its last step is missing, else undo it."""
    exchange = Exchange.read(root)
    if exchange is None:
        return
    if exchange.done:
        _remove_aside(root, exchange)
    else:
        _undo(root, exchange)


def _undo(root: Path, exchange: Exchange) -> None:
    for source, target, inode in reversed(exchange.coming):
        path = root / target
        if os.path.lexists(path) and path.lstat().st_ino == inode:
            # If the staging directory is gone, the file goes too.
            if (root / source).parent.is_dir():
                path.rename(root / source)
            else:
                path.unlink()
    for source, target in reversed(exchange.leaving):
        if os.path.lexists(root / target) and not os.path.lexists(root / source):
            (root / target).rename(root / source)
    remove_empty([root / name for name in exchange.made])
    _flush(root, exchange)
    (root / STATE / EXCHANGE).unlink()
    fsync(root / STATE)


def _remove_aside(root: Path, exchange: Exchange) -> None:
    """Delete the files aside, and the directories of the earlier run that are empty now."""
    for _, target in exchange.leaving:
        (root / target).unlink(missing_ok=True)
    names = {path for source, target in exchange.leaving for path in (source, target)}
    emptied = {root / parent for name in names for parent in Path(name).parents if parent != Path()}
    remove_empty([path for path in emptied if not path.is_mount()])
    (root / STATE / EXCHANGE).unlink(missing_ok=True)
    fsync(root / STATE)


def _flush(root: Path, exchange: Exchange) -> None:
    for directory in sorted({(root / name).parent for pair in exchange.renames for name in pair}):
        with suppress(FileNotFoundError):
            fsync(directory)
