"""One run in the place of another, by renames that are written down first: done in full, or taken back."""

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
    """Renames, in their order; paths are relative to the run's directory."""

    leaving: list[tuple[str, str]]
    """Files of the earlier run, and where they lie aside."""
    coming: list[tuple[str, str, int]]
    """Files of the new run, where they go, and their inodes."""
    made: list[str]
    """Directories that are made for it, the outermost first."""
    done: bool = False

    @classmethod
    def plan(cls, root: Path, leaving: Iterable[str], coming: Mapping[str, Path]) -> Exchange:
        """Plan an exchange in which files `leaving` move aside and files `coming`, by their new path, come."""
        aside = f"{STAGING}previous-{secrets.token_hex(6)}"
        names = [*leaving, *([f"{STATE}/{LIST}"] if (root / STATE / LIST).exists() else [])]
        away = [(name, _aside(root, name, aside)) for name in names]
        there = [(os.path.relpath(path, root), name, path.lstat().st_ino) for name, path in coming.items()]
        targets = [*(root / name for _, name in away), *(root / name for _, name, _ in there)]
        missing = {one for path in targets for one in path.parents if not one.exists()}
        made = sorted((os.path.relpath(one, root) for one in missing), key=lambda name: (name.count("/"), name))
        return cls(away, there, made)

    @classmethod
    def read(cls, root: Path) -> Exchange | None:
        """Read the exchange that a run was at; None if there is none."""
        path = root / STATE / EXCHANGE
        if not path.is_file():
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            [(one[0], one[1]) for one in content["leaving"]],
            [(one[0], one[1], one[2]) for one in content["coming"]],
            content["made"],
            content["done"],
        )

    def write(self, root: Path, *, done: bool) -> None:
        """Write it down."""
        write_text(root / STATE / EXCHANGE, json.dumps({**asdict(self), "done": done}, indent=1) + "\n")


def _aside(root: Path, name: str, aside: str) -> str:
    """Say where a file goes aside: on the disk where it is, which a link of the user's may lead to."""
    parts = Path(name).parts
    anchor = next((depth for depth in range(len(parts) - 1, 0, -1) if is_elsewhere(root.joinpath(*parts[:depth]))), 0)
    return Path(*parts[:anchor], aside, *parts[anchor:]).as_posix()


def run_exchange(root: Path, exchange: Exchange) -> None:
    """Move everything, then remove what went aside. An error takes all of it back, and is raised."""
    exchange.write(root, done=False)
    try:
        for name in exchange.made:
            (root / name).mkdir(exist_ok=True)
        for source, target in [*exchange.leaving, *((one[0], one[1]) for one in exchange.coming)]:
            if os.path.lexists(root / target):
                raise TrainingError(f"{shown_path(root / target)} is in the way: no run of the kit wrote it; move it")
            (root / source).rename(root / target)
        _flush(root, exchange)
        exchange.write(root, done=True)
    except BaseException:
        _take_back(root, exchange)
        raise
    _remove_aside(root, exchange)


def finish_exchange(root: Path) -> None:
    """End an exchange that was broken off: with its last step if only that is missing, else by taking it back."""
    exchange = Exchange.read(root)
    if exchange is None:
        return
    if exchange.done:
        _remove_aside(root, exchange)
    else:
        _take_back(root, exchange)


def _take_back(root: Path, exchange: Exchange) -> None:
    for source, target, inode in reversed(exchange.coming):
        path = root / target
        if os.path.lexists(path) and path.lstat().st_ino == inode:
            # The staging directory may have been cleared away; then the file goes too.
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
    """Remove what went aside, and the directories of the earlier run that hold nothing any more."""
    for _, target in exchange.leaving:
        (root / target).unlink(missing_ok=True)
    names = {path for source, target in exchange.leaving for path in (source, target)}
    emptied = {root / parent for name in names for parent in Path(name).parents if parent != Path()}
    remove_empty([path for path in emptied if not path.is_mount()])
    (root / STATE / EXCHANGE).unlink(missing_ok=True)
    fsync(root / STATE)


def _flush(root: Path, exchange: Exchange) -> None:
    moved = [*exchange.leaving, *((one[0], one[1]) for one in exchange.coming)]
    for directory in sorted({(root / name).parent for pair in moved for name in pair}):
        with suppress(FileNotFoundError):
            fsync(directory)
