"""Progress: one line that fits any terminal, or separate lines where there is none.

Code reports progress with `phase` and `counting`; a command chooses the console with `shown_on`. Without it, nothing is
printed.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from lora_llava.system.ranks import note_phase

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live

Advance = Callable[[int], None]
"""Called with the number of items finished since the last call."""

_MIN_BAR, _MAX_BAR = 6, 30
_RECENT = 50
"""Number of recent updates that the speed is estimated from."""
_REFRESH_SECONDS = 0.1
_TENTHS = 10
_QUIET_SECONDS = 5.0

_console: ContextVar[Console | None] = ContextVar("console", default=None)


@contextmanager
def shown_on(console: Console | None = None) -> Iterator[Console]:
    """Show phases and counts inside the `with` block: on `console`, else where they are shown already, else stdout."""
    from lora_llava.system.console import open_console

    console = console or _console.get() or open_console()
    token = _console.set(console)
    try:
        yield console
    finally:
        _console.reset(token)


def phase(text: str) -> None:
    """Announce a step that may take a while."""
    note_phase(text)
    if (console := _console.get()) is not None:
        console.print(f"{text} ...", style="dim", markup=False, soft_wrap=True)


def note(text: str) -> None:
    """Tell the user something that deserves to be known: on the console, or without one in the log of Python."""
    if (console := _console.get()) is None:
        logging.getLogger("lora_llava").warning(text)
    else:
        console.print(f"Note: {text}", style="yellow", markup=False, soft_wrap=True)


@contextmanager
def counting(label: str, total: int) -> Iterator[Advance]:
    """Show a progress bar; yield the function to call with the number of newly finished items."""
    console = _console.get()
    if console is None or total < 1:
        yield lambda _: None
        return
    bar = Bar(label, total, console, quiet_seconds=_QUIET_SECONDS)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        bar.update(done)

    with bar:
        yield advance


class Bar:
    """A progress bar with the time left: one line on a terminal, a line per tenth elsewhere.

    Has no thread, because the work may fork processes.
    """

    def __init__(self, label: str, total: int, console: Console, *, quiet_seconds: float = 0.0) -> None:
        self.label, self.total, self.console = label, total, console
        self.quiet_seconds = quiet_seconds
        """Without a terminal: minimum seconds between lines, so that quick work prints none."""
        self.done = 0
        self.figures: Sequence[str] = ()
        """Texts after the count, most important first; those that do not fit are dropped."""
        self._seen: deque[tuple[float, float]] = deque(maxlen=_RECENT + 1)
        self._live: Live | None = None
        self._drawn = 0.0
        self._tenth = 0
        self._last_line = 0.0
        self._total_work: float = total

    def __enter__(self) -> Bar:
        """Start the clock and, on a terminal, draw the bar."""
        self.start(0)
        return self

    def __exit__(self, *_error: object) -> None:
        """Remove the bar."""
        self.stop()

    def start(self, done: int, work: float | None = None) -> None:
        """Start at `done` items; `work` as in `update`."""
        self.done = done
        self._last_line = time.monotonic()
        self._seen.append((self._last_line, done if work is None else work))
        if self.console.is_terminal:
            from rich.live import Live

            self._live = Live(self, console=self.console, auto_refresh=False, transient=True)
            self._live.start(refresh=True)

    def stop(self) -> None:
        """Remove the bar."""
        if self._live is not None:
            self._live.update(self, refresh=True)
            self._live.stop()
            self._live = None

    def update(self, done: int, work: float | None = None, total_work: float | None = None) -> None:
        """Show `done` items; if they differ in size, estimate the time left from `work` of `total_work`."""
        self.done = done
        self._seen.append((time.monotonic(), done if work is None else work))
        self._total_work = self.total if total_work is None else total_work
        self.redraw(force=done >= self.total)
        if not self.console.is_terminal:
            self._print_line(done)

    def _print_line(self, done: int) -> None:
        """Print a line per tenth, at most once in `quiet_seconds`."""
        now, tenth = time.monotonic(), _TENTHS * done // self.total
        if tenth > self._tenth and now - self._last_line >= self.quiet_seconds:
            self._tenth, self._last_line = tenth, now
            left = "" if done >= self.total or self.seconds_left is None else f", {duration(self.seconds_left)} left"
            self.console.print(f"{self.label}: {done:,}/{self.total:,}{left}", markup=False)

    def redraw(self, *, force: bool = False) -> None:
        """Redraw the bar, unless it was just drawn."""
        now = time.monotonic()
        if self._live is not None and (force or now - self._drawn >= _REFRESH_SECONDS):
            self._drawn = now
            self._live.refresh()

    @property
    def seconds_left(self) -> float | None:
        """Time left, estimated from the last items; None before the first."""
        (first_time, first), (last_time, last) = self._seen[0], self._seen[-1]
        if last <= first:
            return None
        rest = (self._total_work - last) * (last_time - first_time) / (last - first)
        return max(0.0, rest - (time.monotonic() - last_time))

    def line(self, width: int) -> str:
        """Return the bar in `width` columns: always label, count and time left; bar and figures if they fit."""
        left = self.seconds_left
        ending = f"{duration(left)} left" if left is not None else "-:-- left"
        count = f"{self.done:,}/{self.total:,}"
        shown = list(self.figures[:1])
        # Three spaces around the bar and before the time, two before each figure.
        used = len(self.label) + len(count) + len(ending) + 3 + sum(2 + len(figure) for figure in shown)
        room = width - used - _MIN_BAR
        if room < 0:
            return " ".join([self.label, count, *shown, ending])[:width]
        for figure in self.figures[1:]:
            if len(figure) + 2 > room:
                break
            shown.append(figure)
            room -= len(figure) + 2
        cells = min(_MAX_BAR, _MIN_BAR + room)
        full = cells * min(self.done, self.total) // self.total
        bar = "\N{BOX DRAWINGS HEAVY HORIZONTAL}" * full + "\N{BOX DRAWINGS LIGHT HORIZONTAL}" * (cells - full)
        return " ".join([self.label, bar, "  ".join([count, *shown]), ending])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the bar for rich."""
        from rich.text import Text

        # One column less: some terminals wrap a line that fills the last column.
        yield Text(self.line(options.max_width - 1), no_wrap=True, overflow="crop", end="")


def duration(seconds: float) -> str:
    """Format seconds as `0:53`, `12:05` or `1:02:33`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
