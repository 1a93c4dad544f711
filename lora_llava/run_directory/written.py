"""The list of files that a run wrote, which tells them from the user's.

`.lora-llava/written.jsonl` gets a line for each file before the file gets its name. A file is the run's if it matches
any line of its path, by size, time and inode, or by size and SHA-256; so a file that was edited since is the user's.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_llava.system.files import find_json

STATE = ".lora-llava"
"""Directory of the kit's own files, in each directory that it writes to."""
_FORMAT_FILE = "format.json"
LIST = "written.jsonl"
NEW = "new"
"""In `STATE`: what a run has written before its first complete checkpoint."""
EXCHANGE = "exchange.json"
"""In `STATE`, while one run replaces another: the renames, and whether they are done."""
PENDING = "pending.json"
"""In `NEW`, while it is in use."""
_FORMAT = {"made_by": "lora-llava", "format": 1}
_MAX_HASHED_BYTES = 64 * 2**20
"""Larger files are not hashed for the list; if their hash is not known, the time must match."""


@dataclass(frozen=True, slots=True)
class Version:
    """A file as it was written at one time."""

    path: str
    """Relative to the directory of the list."""
    bytes: int
    mtime_ns: int
    inode: int
    sha256: str | None
    """Of its first `bytes` bytes."""
    grows: bool = False
    """Whether the run appends to it, as to a log."""


class Written:
    """The list of a directory at the time it was read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.versions: dict[str, list[Version]] = {}
        path = root / STATE / LIST
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                version = Version(**json.loads(line))
            except (ValueError, TypeError):
                # A power cut left the line incomplete: its file counts as the user's.
                continue
            self.versions.setdefault(version.path, []).append(version)

    def is_ours(self, name: str) -> bool:
        """Tell whether the file at `name` is one that the run wrote, unchanged."""
        versions = self.versions.get(name, [])
        try:
            status = (self.root / name).lstat()
            return stat.S_ISREG(status.st_mode) and (
                any(_same_file(version, status) for version in versions)
                or self._same_content(name, versions, status.st_size)
            )
        except OSError:
            return False

    def _same_content(self, name: str, versions: list[Version], size: int) -> bool:
        path = self.root / name
        modified = path.lstat().st_mtime_ns
        if any(
            version.sha256 is None and (version.bytes, version.mtime_ns) == (size, modified) for version in versions
        ):
            return True
        hashed = [
            version
            for version in versions
            if version.sha256 and (version.bytes == size or (version.grows and version.bytes < size))
        ]
        return any(
            _sha256(path, version.bytes) == version.sha256 and _is_log(path, version.bytes) for version in hashed
        )

    def present(self) -> list[str]:
        """List the files of the run that are there unchanged, sorted by path."""
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
    """Tell whether a file holds lines of the kit's log from byte `start` on; the last line may be incomplete."""
    with path.open("rb") as handle:
        handle.seek(start)
        lines = handle.read().splitlines(keepends=True)
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        incomplete = not line.endswith(b"\n") and b'{"stage": "'.startswith(line[:11])
        if not incomplete and not (isinstance(row, dict) and {"stage", "step"} <= row.keys()):
            return False
    return True


def read_written(root: Path) -> Written | None:
    """Read the list of a directory; None if it has none that the kit made."""
    return Written(root) if is_kits(root / STATE) and (root / STATE / LIST).is_file() else None


def is_kits(state: Path) -> bool:
    """Tell whether the kit made the existing directory `state`."""
    path = state / _FORMAT_FILE
    if state.is_symlink() or path.is_symlink() or (state / LIST).is_symlink():
        return False
    content = find_json(path)
    # Empty if the process was killed before it wrote the file.
    return content.get("made_by") == _FORMAT["made_by"] if content else state.is_dir() and not any(state.iterdir())


def make_state(root: Path) -> Path:
    """Create the kit's own directory in `root` if needed, and return it."""
    state = root / STATE
    state.mkdir(exist_ok=True)
    if not (state / _FORMAT_FILE).exists():
        (state / _FORMAT_FILE).write_text(json.dumps(_FORMAT) + "\n", encoding="utf-8")
    return state


def is_pending(root: Path) -> bool:
    """Tell whether the run in `root` has no complete checkpoint yet, so that its files are below `STATE`."""
    return (root / STATE / NEW / PENDING).exists()


def current(root: Path) -> Path:
    """Return the directory to which the run in `root` writes now."""
    return root / STATE / NEW if is_pending(root) else root


def version_of(file: Path, name: str, sha256: str | None = None, *, grows: bool = False) -> Version:
    """Describe a complete file, which has or will have the path `name`."""
    status = file.lstat()
    if sha256 is None and status.st_size <= _MAX_HASHED_BYTES:
        sha256 = _sha256(file, status.st_size)
    return Version(name, status.st_size, status.st_mtime_ns, status.st_ino, sha256, grows)


def note(root: Path, versions: list[Version]) -> None:
    """Append files to the list of `root`, and flush it to disk."""
    path = (root / STATE / NEW if is_pending(root) else make_state(root)) / LIST
    _append(path, "".join(json.dumps(asdict(version)) + "\n" for version in versions))


def note_all(root: Path, files: Mapping[str, Path], hashes: Mapping[str, str] | None = None) -> None:
    """Append complete files, keyed by their final path, to the list of `root`; `hashes`: SHA-256 by that path."""
    note(root, [version_of(file, name, (hashes or {}).get(name)) for name, file in files.items()])


def _append(path: Path, text: str) -> None:
    """Append lines to a file and flush it to disk; never write through a link.

    If a power cut left the last line incomplete, end that line first.
    """
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        size = os.fstat(handle).st_size
        incomplete = size and os.pread(handle, 1, size - 1) != b"\n"
        data = ("\n" * bool(incomplete) + text).encode()
        while data:
            data = data[os.write(handle, data) :]
        os.fsync(handle)
    finally:
        os.close(handle)
