"""Signals that ask a run to stop: the first is noted, so that the step ends and is saved; a second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Context in which SIGINT and SIGTERM are noted; what they did before is restored at its end."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The first signal, if there was one."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        # Python lets no other thread set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # What is ignored stays so, as for a command behind nohup.
                if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                    self._before[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self._restore()
            os.kill(os.getpid(), number)
            return
        self.received = signal.Signals(number)
        line = f"\n{self.received.name}: the step is finished and saved before the run stops; once more stops at once\n"
        # Not print: the signal may come in the middle of one.
        os.write(2, line.encode())


def end_with_parent(_: int) -> None:
    """Let a worker process end by its parent's word alone: a terminal, or a scheduler, sends its signals to all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    # Not ignored: the parent ends its workers by this signal, and waits for them.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
