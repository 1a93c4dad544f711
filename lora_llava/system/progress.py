"""What a person sees while work goes on: one line that fits any terminal, or plain lines where there is none.

Functions deep inside the work say what they do with `phase` and `counting`; a command decides with `show_on` where that
is shown. Without it they are silent.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live

Advance = Callable[[int], None]
"""Hears how many items are done since the last time."""

_MIN_BAR, _MAX_BAR = 6, 30
_RECENT = 50
"""Updates from which the speed is taken."""
_REFRESH_SECONDS = 0.1
_TENTHS = 10
_QUIET_SECONDS = 5.0

_console: ContextVar[Console | None] = ContextVar("console", default=None)


def show_on(console: Console) -> Token[Console | None]:
    """Show phases and counts on `console` from now on; `hide` takes the result."""
    return _console.set(console)


def hide(token: Token[Console | None]) -> None:
    """Undo a `show_on`."""
    _console.reset(token)


@contextmanager
def shown_on(console: Console | None = None) -> Iterator[Console]:
    """Show phases and counts inside the `with` block: on `console`, else where they are shown already, else stdout."""
    from lora_llava.system.console import open_console

    console = console or _console.get() or open_console()
    token = show_on(console)
    try:
        yield console
    finally:
        hide(token)


def phase(text: str) -> None:
    """Say what begins now and may take a while."""
    if (console := _console.get()) is not None:
        console.print(f"{text} ...", style="dim", markup=False, soft_wrap=True)


@contextmanager
def counting(label: str, total: int) -> Iterator[Advance]:
    """Give a function that hears of finished items; they are shown with the time left."""
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
    """Items done of a total, with the time left: one line on a terminal, a line each tenth elsewhere.

    No thread redraws it: the work may fork processes meanwhile.
    """

    def __init__(self, label: str, total: int, console: Console, *, quiet_seconds: float = 0.0) -> None:
        self.label, self.total, self.console = label, total, console
        self.quiet_seconds = quiet_seconds
        """Where there is no terminal: time without a line, so that quick work leaves none."""
        self.done = 0
        self.figures: Sequence[str] = ()
        """Shown behind the count, the most important first; those without room are left out."""
        self._seen: deque[tuple[float, float]] = deque(maxlen=_RECENT + 1)
        self._live: Live | None = None
        self._drawn = 0.0
        self._tenth = 0
        self._last_line = 0.0
        self._total_work: float = total

    def __enter__(self) -> Bar:
        """Start the clock and, on a terminal, draw the line."""
        self.start(0)
        return self

    def __exit__(self, *_error: object) -> None:
        """Take the line down."""
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
        """Take the line down."""
        if self._live is not None:
            self._live.update(self, refresh=True)
            self._live.stop()
            self._live = None

    def update(self, done: int, work: float | None = None, total_work: float | None = None) -> None:
        """Show `done` items; where they differ in size, the time left is that of `work` of `total_work`."""
        self.done = done
        self._seen.append((time.monotonic(), done if work is None else work))
        self._total_work = self.total if total_work is None else total_work
        self.redraw(force=done >= self.total)
        if not self.console.is_terminal:
            self._plain_line(done)

    def _plain_line(self, done: int) -> None:
        """Print a line each tenth, and not more often than `quiet_seconds` asks."""
        now, tenth = time.monotonic(), _TENTHS * done // self.total
        if tenth > self._tenth and now - self._last_line >= self.quiet_seconds:
            self._tenth, self._last_line = tenth, now
            left = "" if done >= self.total or self.seconds_left is None else f", {duration(self.seconds_left)} left"
            self.console.print(f"{self.label}: {done:,}/{self.total:,}{left}", markup=False)

    def redraw(self, *, force: bool = False) -> None:
        """Draw the line again, unless that has just been done."""
        now = time.monotonic()
        if self._live is not None and (force or now - self._drawn >= _REFRESH_SECONDS):
            self._drawn = now
            self._live.refresh()

    @property
    def seconds_left(self) -> float | None:
        """Estimate the time left from the last items; None before the first."""
        (first_time, first), (last_time, last) = self._seen[0], self._seen[-1]
        if last <= first:
            return None
        rest = (self._total_work - last) * (last_time - first_time) / (last - first)
        return max(0.0, rest - (time.monotonic() - last_time))

    def line(self, width: int) -> str:
        """Write the line in `width` columns: label, count and time left always, bar and figures as there is room."""
        left = self.seconds_left
        ending = f"{duration(left)} left" if left is not None else "-:-- left"
        count = f"{self.done:,}/{self.total:,}"
        shown = list(self.figures[:1])
        # The spaces around the bar and before the time are three, before each figure there are two.
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
        """Draw the line for rich."""
        from rich.text import Text

        # One column less: some terminals wrap a line that fills the last one.
        yield Text(self.line(options.max_width - 1), no_wrap=True, overflow="crop", end="")


def duration(seconds: float) -> str:
    """Write a time as `0:53`, `12:05` or `1:02:33`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
