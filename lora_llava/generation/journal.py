"""The answers so far of a prediction, in a file next to its output: a run that was killed continues from it.

The first line holds what the answers depend on, each later line the answers of one batch. A line that was not finished
is cut off.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lora_llava.errors import RecipeError
from lora_llava.system.files import disk_errors, shown_path

_FORMAT = 1
Facts = Mapping[str, str | int | None]
"""What answers depend on, by names for messages."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to one question."""

    text: str
    log_probability: float
    """Natural logarithm of the probability of all its tokens, the end token included."""
    num_tokens: int
    """Tokens, the end token included."""
    is_cut: bool
    """Whether `max_new_tokens` cut it short."""
    image: str | None = None
    """Size and modification time of its image file, by which a changed image is noticed."""


class Journal:
    """The answers of a prediction by the index of their question; more are appended batch by batch."""

    def __init__(self, path: Path, file: BinaryIO, answers: dict[int, Answer]) -> None:
        self.path = path
        self.answers = answers
        self._file = file

    def add(self, answers: Mapping[int, Answer]) -> None:
        """Append the answers of a batch. Raises ArtifactError if the disk is full."""
        with disk_errors(self.path, f"The answers so far stay in {self.path.name}"):
            _append(self._file, {str(index): asdict(answer) for index, answer in answers.items()})
        self.answers.update(answers)


@contextmanager
def open_journal(path: Path, facts: Facts) -> Iterator[Journal]:
    """Open the journal of a prediction, or begin one; an empty one is removed at the end.

    Raises RecipeError if it depends on other `facts`, is damaged, or is in use by another process; ArtifactError if the
    disk takes no more.
    """
    if path.exists() and not path.is_file():
        raise RecipeError(f"{path} is not a regular file; remove it, or give another output")
    with ExitStack() as stack:
        # Not around the block: an error there, such as that of reading the model, is not one of this file.
        with disk_errors(path, "Nothing was written"):
            file = stack.enter_context(path.open("a+b"))
            _lock(file, path)
            journal = Journal(path, file, _read(file, path, facts))
        try:
            yield journal
        finally:
            if not journal.answers:
                with suppress(OSError):
                    path.unlink()


def _lock(file: BinaryIO, path: Path) -> None:
    """Lock a journal for this process. Raises RecipeError if another one has it, or finished with it just now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RecipeError(f"{path} is in use: another process writes these answers; wait for it") from None
    except OSError:
        # A file system without locks.
        return
    # Between opening and locking it, its owner may have removed it.
    if os.fstat(file.fileno()).st_nlink == 0:
        raise RecipeError(f"{path} was removed by another process, which finished these answers; look at the output")


def _read(file: BinaryIO, path: Path, facts: Facts) -> dict[int, Answer]:
    """Return the answers in a journal, after its unfinished line is cut off; begin it if it is empty."""
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        file.truncate(whole)
    lines = content[:whole].splitlines()
    if not lines:
        _append(file, {"format": _FORMAT, **facts})
        return {}
    try:
        before, *batches = map(json.loads, lines)
        answers = {int(index): Answer(**answer) for batch in batches for index, answer in batch.items()}
        _refuse_others(path, before, {"format": _FORMAT, **facts})
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise RecipeError(f"{path} is damaged; remove it to ask all questions again") from None
    return answers


def _refuse_others(path: Path, before: dict[str, Any], now: Facts) -> None:
    """Raise RecipeError if answers depend on anything else than before."""
    differing = [
        f"{name} {before.get(name)}, now {value}" if isinstance(value, int) else name
        for name, value in now.items()
        if before.get(name) != value
    ]
    if differing:
        raise RecipeError(
            f"{path} has the first answers of another prediction; these differ: {'; '.join(differing)}. Continue that "
            f"one by its own command, give another output, or remove {shown_path(path)}"
        )


def _append(file: BinaryIO, line: Mapping[str, Any]) -> None:
    """Append one line in one write, so that a killed process leaves at most one unfinished line."""
    file.write(json.dumps(line).encode() + b"\n")
    file.flush()


def image_stamp(path: Path | None) -> str | None:
    """Return size and modification time of an image file; None if it is embedded or missing."""
    if path is None:
        return None
    try:
        stat = os.stat(path)  # noqa: PTH116 - once for every question
    except OSError:
        return None
    return f"{stat.st_size}/{stat.st_mtime_ns}"
