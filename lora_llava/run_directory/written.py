"""The list of the files that a run wrote, by which its files are told from the user's.

`.lora-llava/written.jsonl` gets a line for each file before the file gets its name. A file is the run's if it is what
any line of its path says: size, time and inode, or size and SHA-256. So a file that was edited since is the user's.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

STATE = ".lora-llava"
"""What the kit itself keeps in a directory that it writes to."""
FORMAT_FILE = "format.json"
LIST = "written.jsonl"
NEW = "new"
"""Below `STATE`: what a run has written before its first whole checkpoint."""
EXCHANGE = "exchange.json"
"""In `STATE`, while one run takes the place of another: what moves, and whether it is done."""
PENDING = "pending.json"
"""In `NEW`, while it is in use."""
_FORMAT = {"made_by": "lora-llava", "format": 1}
_HASHED = 64 * 2**20
"""Largest file, in bytes, that is hashed for the list; of larger ones whose hash is not known, the time must do."""


@dataclass(frozen=True, slots=True)
class Version:
    """A file as it was written at one time."""

    path: str
    """From the directory of the list."""
    bytes: int
    mtime_ns: int
    inode: int
    sha256: str | None
    """Of its first `bytes` bytes."""
    grows: bool = False
    """Whether the run appends to it: a log."""


class Written:
    """The list of a directory, as it was when it was read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.versions: dict[str, list[Version]] = {}
        path = root / STATE / LIST
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                version = Version(**json.loads(line))
            except (ValueError, TypeError):
                # Cut by a power cut: what it named counts as the user's.
                continue
            self.versions.setdefault(version.path, []).append(version)

    def is_ours(self, name: str) -> bool:
        """Tell whether the file at `name` is one that the run wrote, unchanged."""
        versions = self.versions.get(name, [])
        try:
            status = (self.root / name).lstat()
            return stat.S_ISREG(status.st_mode) and (
                any(_same_file(one, status) for one in versions) or self._same_content(name, versions, status.st_size)
            )
        except OSError:
            return False

    def _same_content(self, name: str, versions: list[Version], size: int) -> bool:
        path = self.root / name
        modified = path.lstat().st_mtime_ns
        if any(one.sha256 is None and (one.bytes, one.mtime_ns) == (size, modified) for one in versions):
            return True
        hashed = [one for one in versions if one.sha256 and (one.bytes == size or (one.grows and one.bytes < size))]
        return any(_sha256(path, one.bytes) == one.sha256 and _is_log(path, one.bytes) for one in hashed)

    def present(self) -> list[str]:
        """List the files of the run that are there, unchanged; in order of their paths."""
        return sorted(name for name in self.versions if self.is_ours(name))


def _same_file(version: Version, status: os.stat_result) -> bool:
    return (version.bytes, version.mtime_ns, version.inode) == (status.st_size, status.st_mtime_ns, status.st_ino)


def _sha256(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while size and (block := handle.read(min(size, 2**20))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def _is_log(path: Path, start: int) -> bool:
    """Tell whether what a file holds from byte `start` on are lines of the kit's log, the last of which may be cut."""
    with path.open("rb") as handle:
        handle.seek(start)
        lines = handle.read().splitlines(keepends=True)
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        cut = not line.endswith(b"\n") and b'{"stage": "'.startswith(line[:11])
        if not cut and not (isinstance(row, dict) and {"stage", "step"} <= row.keys()):
            return False
    return True


def read_written(root: Path) -> Written | None:
    """Read the list of a directory; None if it has none that the kit made."""
    return Written(root) if is_kits(root / STATE) and (root / STATE / LIST).is_file() else None


def is_kits(state: Path) -> bool:
    """Tell whether the kit made the directory `state`, which is there."""
    path = state / FORMAT_FILE
    if state.is_symlink() or path.is_symlink() or (state / LIST).is_symlink():
        return False
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("made_by") == _FORMAT["made_by"])
    except (OSError, ValueError, AttributeError):
        # Made, and then killed before the file was in it.
        return state.is_dir() and not any(state.iterdir())


def make_state(root: Path) -> Path:
    """Make the kit's own directory in `root`, if it is not there; return it."""
    state = root / STATE
    state.mkdir(exist_ok=True)
    if not (state / FORMAT_FILE).exists():
        (state / FORMAT_FILE).write_text(json.dumps(_FORMAT) + "\n", encoding="utf-8")
    return state


def is_pending(root: Path) -> bool:
    """Tell whether the run in `root` has no whole checkpoint yet, so that its files are below `STATE`."""
    return (root / STATE / NEW / PENDING).exists()


def current(root: Path) -> Path:
    """Return the directory to which the run in `root` writes now."""
    return root / STATE / NEW if is_pending(root) else root


def version_of(file: Path, name: str, sha256: str | None = None, *, grows: bool = False) -> Version:
    """Describe a whole file, which has or will have the path `name`."""
    status = file.lstat()
    if sha256 is None and status.st_size <= _HASHED:
        sha256 = _sha256(file, status.st_size)
    return Version(name, status.st_size, status.st_mtime_ns, status.st_ino, sha256, grows)


def note(root: Path, versions: list[Version]) -> None:
    """Add files to the list of `root`, on the disk."""
    path = (root / STATE / NEW if is_pending(root) else make_state(root)) / LIST
    append(path, "".join(json.dumps(asdict(one)) + "\n" for one in versions))


def note_all(root: Path, files: Mapping[str, Path], hashes: Mapping[str, str] | None = None) -> None:
    """Add whole files, by the path that each will have, to the list of `root`; `hashes`: SHA-256 by that path."""
    note(root, [version_of(file, name, (hashes or {}).get(name)) for name, file in files.items()])


def append(path: Path, text: str) -> None:
    """Append lines to a file, never through a link, and bring them to the disk.

    A line that a power cut left unfinished is ended first.
    """
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        size = os.fstat(handle).st_size
        unfinished = size and os.pread(handle, 1, size - 1) != b"\n"
        data = ("\n" * bool(unfinished) + text).encode()
        while data:
            data = data[os.write(handle, data) :]
        os.fsync(handle)
    finally:
        os.close(handle)
