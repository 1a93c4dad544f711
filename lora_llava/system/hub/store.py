"""Bound uploads to the Hub's store of large files, Xet."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lora_llava.system.hub import network
from lora_llava.system.hub.network import GiveUpError

_TICK = 0.2
"""Seconds between looks at the progress."""


class _Progress:
    """When an upload last advanced."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self._seen: tuple[int, int] = (0, 0)

    def note(self, report: Any) -> None:
        """Take a report of `hf_xet`, which comes several times a second, whether or not anything advanced."""
        seen = (report.total_bytes_completed, report.total_transfer_bytes_completed)
        if seen != self._seen:
            self._seen, self.last = seen, time.monotonic()


class _WatchedSession:
    """A session of `hf_xet` whose uploads report their progress to a `_Progress`, too."""

    def __init__(self, session: Any, progress: _Progress) -> None:
        self._session = session
        self._progress = progress

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def new_upload_commit(self, *, progress_callback: Callable[..., None] | None = None, **settings: Any) -> Any:
        """Begin an upload."""

        def report(group: Any, items: Any) -> None:
            self._progress.note(group)
            if progress_callback is not None:
                progress_callback(group, items)

        return self._session.new_upload_commit(progress_callback=report, **settings)


def _session_holder() -> Any:
    """Return what holds the session of `hf_xet`: a private object; None without Xet, or where it has another name.

    The settings of `hf_xet` then still bound most of the waits.
    """
    from huggingface_hub.utils._runtime import is_xet_available

    if not is_xet_available():
        return None
    from huggingface_hub.utils import _xet

    return getattr(_xet, "_GLOBAL_XET_HOLDER", None)


@contextmanager
def watched_upload() -> Iterator[None]:
    """End an upload in this block that makes no progress for `Bounds.store_silence`. Raises GiveUpError.

    The settings of `hf_xet` bound the upload of a block, but not of the list of what was uploaded.
    """
    holder = _session_holder()
    if holder is None:
        yield
        return
    session = holder.get()
    silence = network.BOUNDS.store_silence
    progress, done, aborted = _Progress(), threading.Event(), threading.Event()

    def watch() -> None:
        while not done.wait(_TICK):
            if time.monotonic() - progress.last > silence:
                aborted.set()
                holder.sigint_abort()
                return

    holder._session = _WatchedSession(session, progress)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        if not aborted.is_set():
            raise
        what = f"the store for large files (Xet) does not answer: no progress for {silence:g} seconds"
        raise GiveUpError(f"{what}. A firewall may block it: {network.OLD_WAY}", answered=True) from error
    finally:
        done.set()
        if isinstance(holder._session, _WatchedSession):
            holder._session = session
