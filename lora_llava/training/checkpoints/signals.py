"""Handle SIGINT and SIGTERM: the first lets the step finish and saves it; the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

from lora_llava.system.ranks import is_first, largest

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Record SIGINT and SIGTERM inside the `with` block; the previous handlers are restored when it ends."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The first signal received, if any."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        # Only the main thread may set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # Keep ignoring what was ignored, as under nohup.
                if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                    self._before[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def agree(self) -> signal.Signals | None:
        """Return the signal that any process of the run has received, the same in all; take it over."""
        number = largest(self.received or 0)
        if not number:
            return None
        self.received = signal.Signals(number)
        return self.received

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
        if not is_first():
            return
        line = f"\n{self.received.name}: the step is finished and saved before the run stops; once more stops at once\n"
        # os.write, not print: the signal may interrupt a print.
        os.write(2, line.encode())


def end_with_parent(_: int) -> None:
    """Make a data-loader worker obey only its parent's signals: Ctrl-C reaches the whole process group."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    # Do not ignore SIGTERM: the parent ends its workers with it, and waits for them.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
