"""A disk that fails, or a process that dies, at any write, flush, rename or removal below a directory."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.peft_model
import pytest

from lora_llava.training.checkpoints import state

Act = Callable[[str, str], None]
"""What happens in the place of a call: its name, and the path it is about."""
WRITES = ("open", "save_file", "fsync", "rename", "replace", "mkdir")
REMOVALS = ("unlink", "remove", "rmdir")


class Disk:
    """Counts what is done to files below `directory`; from call `first` on, `act` is called before it."""

    def __init__(self, directory: Path, act: Act | None = None, first: int = 0) -> None:
        self.directory = str(directory.resolve())
        self.act = act
        self.first = first
        self.calls: list[tuple[str, str]] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Stand between Python and the disk."""
        opened = builtins.open
        for module in (builtins, io):
            patch.setattr(module, "open", self._opening(opened))
        for name in WRITES[2:] + REMOVALS:
            patch.setattr(os, name, self._watching(name, getattr(os, name)))
        patch.setattr(state, "save_file", self._saving(state.save_file))
        patch.setattr(peft.peft_model, "safe_save_file", self._saving(peft.peft_model.safe_save_file))

    def _note(self, name: str, path: str) -> None:
        if path.startswith(self.directory):
            self.calls.append((name, path))
            if self.act is not None and len(self.calls) > self.first:
                self.act(name, path)

    def _opening(self, original: Any) -> Any:
        def opening(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if isinstance(file, (str, os.PathLike)) and set(mode) & set("wax+"):
                self._note("open", str(Path(file).absolute()))
            return original(file, mode, *args, **options)

        return opening

    def _watching(self, name: str, original: Any) -> Any:
        def watching(place: Any, *args: Any, **options: Any) -> Any:
            handle = place if name == "fsync" else options.get("dir_fd")
            path = Path("" if name == "fsync" else place)
            if handle is not None:
                path = Path(f"/proc/self/fd/{handle}").readlink() / path
            self._note(name, str(path.absolute()))
            return original(place, *args, **options)

        return watching

    def _saving(self, original: Any) -> Any:
        def saving(tensors: Any, path: Any, *args: Any, **options: Any) -> Any:
            original(tensors, path, *args, **options)
            self._note("save_file", str(Path(path).absolute()))

        return saving


def full(name: str, path: str) -> None:
    """Be a disk on which nothing more can be written."""
    if name in WRITES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def read_only(name: str, path: str) -> None:
    """Be a disk that was mounted again for reading only."""
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
