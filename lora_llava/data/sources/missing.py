"""Say why data cannot be had: a mistyped path, told before the Hub is asked, or what the `datasets` library raised."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path

from lora_llava.data.sources.stored.cells import CACHE
from lora_llava.errors import DataError
from lora_llava.recipe.fields import is_local
from lora_llava.recipe.stages import DataSettings
from lora_llava.system.hub.network import offline
from lora_llava.system.names import did_you_mean, nearest, path_hint
from lora_llava.system.text import is_unicode, printable

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_OF_FILES = re.compile(r"\.(xlsx?|ods|txt|xml|ya?ml|zip|tar|t?gz|7z|arrow|feather|orc|pkl|npz|h5|md|pdf|docx)$", re.I)
"""Matches the suffix of a file; those of ids on the Hub are of versions, as in `Instruct-v1.5`."""
_NETWORK = ("httpx", "httpcore", "requests", "urllib3", "huggingface_hub")
"""Packages that raise errors of the network."""
_MIN_SIMILARITY = 0.75
"""Lowest similarity to a file here by which a name that may be an id counts as misspelled, of 1."""


def missing(data: DataSettings, near: Sequence[Path] = (Path(),)) -> tuple[str, str] | None:
    """Return what is wrong with a path of data that is not here, and what to do; None if it is here, or on the Hub.

    `near`: directories that a relative path may be meant from. The Hub is asked within seconds whether it can be
    reached, and only for what has the form of an id and is not like the name of a file.
    """
    path = Path(data.path)
    if not data.path.strip():
        return "the path of the data is empty", "Give a file, a directory, or the id of a data set on the Hub."
    if not is_unicode(data.path):
        return f"{path} has a name that is not UTF-8", "Rename it."
    try:
        if path.exists():
            return None
    except OSError as error:
        # Such as a name of more than 255 bytes.
        return f"{data.path:.60}... is not a path: {error.strerror}", "Correct the path."
    if path.is_symlink():
        return f"{path} is a link to {path.readlink()}, which is not there", "Restore that, or correct the path."
    # Unlike that of Path, this leaves the name of an unknown user.
    if os.path.exists(expanded := os.path.expanduser(data.path)):  # noqa: PTH110, PTH111
        return f"{path} does not exist", f"Write it out: {expanded}"
    directories = [directory / path.parent for directory in near]
    is_id = _HUB_ID.match(data.path) and not is_local(data.path) and not _OF_FILES.search(data.path)
    if not is_id:
        return f"{path} does not exist", path_hint(path, directories)
    cached = _is_cached(data.path)
    # Asked for by its revision, or read before: the Hub is meant.
    is_meant = cached or data.revision is not None
    if not is_meant and (hint := nearest(path.name, directories, _MIN_SIMILARITY)):
        fix = "If a data set of the Hub is meant, name its revision, such as main."
        return f"{path} does not exist here", f"{did_you_mean(path.with_name(hint))} {fix}"
    # Asked of cached data, too: it has the libraries leave a Hub alone that cannot be reached.
    if offline() and not cached:
        what = f"{data.path} is not here, is not in the Hub's cache, and the Hub cannot be reached"
        return what, "Check the name; or connect, or give the path of a copy."
    return None


def refuse_missing(data: DataSettings) -> None:
    """Raise DataError for a path that is neither here nor can be a data set of the Hub."""
    if (problem := missing(data)) is not None:
        what, fix = problem
        raise DataError(printable(f"{what}. {fix}"))


def unreadable(name: str, error: Exception) -> DataError:
    """Return the error for a data set that the `datasets` library cannot read, given what it raised."""
    if type(error).__name__ == "DatasetGenerationError" and isinstance(error.__cause__, Exception):
        # The library's own says only that there was one.
        error = error.__cause__
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return DataError(f"{name}: there is no space left for its cache; free some, or set HF_HOME to another disk")
    reason = str(error).strip().partition("\n")[0][:300]
    if type(error).__name__ == "DatasetNotFoundError":
        return DataError(f"{name}: no such dataset on the Hub, or no access to it; correct path, or log in to the Hub")
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0] in _NETWORK:
        return DataError(f"{name}: the Hub cannot be reached; check the connection, or set path to a local copy")
    return DataError(f"{name}: the dataset cannot be read: {printable(reason) or type(error).__name__}")


def _is_cached(name: str) -> bool:
    """Tell whether a data set of the Hub is cached, as files or as tables of `datasets`."""
    from huggingface_hub import constants

    home = Path(constants.HF_HOME)
    tables = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets"))
    files = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    return any(path.is_dir() for path in (files, tables / CACHE / name.replace("/", "___")))
