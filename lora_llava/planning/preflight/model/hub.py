"""Find models on the Hub: in its cache or by download."""

from __future__ import annotations

from pathlib import Path

from lora_llava.system.hub.failures import gated
from lora_llava.system.hub.network import bounded, offline

_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]


def find_on_hub(name: str, revision: str | None, file: str) -> tuple[Path | None, tuple[str, str]]:
    """Return the local snapshot of a hub repository that has `file`; download small files that are not cached.

    If there is none, the second value says what is wrong and what to do. If the Hub cannot be reached, switch the
    libraries to offline mode: they would retry for a minute.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:
        return None, (f"{name} is neither a directory nor a hub id", "Correct the name.")
    if isinstance(cached, str):
        offline()
        return Path(cached).parent, ("", "")
    if offline():
        what = f"{name} is not a directory, is not in the Hub's cache, and the Hub cannot be reached"
        return None, (what, "Check the name; or connect, or give the directory of a copy.")
    return _fetch(name, revision)


def _fetch(name: str, revision: str | None) -> tuple[Path | None, tuple[str, str]]:
    from huggingface_hub import errors, snapshot_download

    try:
        with bounded():
            return Path(snapshot_download(name, revision=revision, allow_patterns=_SMALL_FILES)), ("", "")
    except errors.GatedRepoError:
        what, _, fix = gated(name).partition(". ")
        return None, (what, f"{fix}.")
    except errors.RevisionNotFoundError:
        return None, (f"{name} has no revision {revision!r}", "Correct base.revision.")
    except errors.RepositoryNotFoundError:
        what = f"{name} is not a directory, and the Hub has no such model, or none that this user may read"
        return None, (what, "Correct the name, or log in: hf auth login.")
    except Exception as error:  # noqa: BLE001 - a network can raise anything
        what = f"{name} cannot be fetched from the Hub ({type(error).__name__})"
        return None, (what, "Try again, or give the directory of a copy.")
