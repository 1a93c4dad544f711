"""Write a checkpoint in a thread, while the training continues."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Self


class BackgroundWriter:
    """Runs one write at a time in a thread; as a context, waits for it at the end."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a write is under way."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise the error that ended the write, if it has ended with one; do not wait."""
        if not self.is_busy:
            self.wait()

    def settle(self) -> None:
        """Wait for the write that is under way; leave its error to `wait` or `check`."""
        if self._thread is not None:
            self._thread.join()

    def start(self, write: Callable[[], object]) -> None:
        """Start a write, after the one before."""
        self.wait()

        def run() -> None:
            try:
                write()
            except BaseException as error:  # noqa: BLE001 - `wait` raises it where the training can end
                self._error = error

        # Not a daemon: a process that ends waits for the write.
        self._thread = Thread(target=run, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the write that is under way; raise the error that ended it."""
        self.settle()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the write; its error is raised unless another one is on its way."""
        try:
            self.wait()
        except BaseException:
            if kind is None:
                raise
