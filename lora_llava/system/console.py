"""The console of the commands: text from users and data is shown literally, never interpreted."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from lora_llava.system.ranks import is_first
from lora_llava.system.text import printable_lines

_LOG_WIDTH = 160
"""Columns where output is not a terminal: wide enough for a line."""


class PlainConsole(Console):
    """Escapes control characters and ignores markup and emoji codes: `[red]` in a name is printed as such."""

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        # Of the processes of a run, the first speaks.
        quiet = not is_first()
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False, width=width, quiet=quiet)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Render as rich does; only rich's own control segments reach the terminal."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable_lines(segment.text), segment.style)


def open_console(*, stderr: bool = False) -> PlainConsole:
    """Return a console as wide as the terminal; where output is not a terminal, wide enough for a log line."""
    console = PlainConsole(stderr=stderr)
    return console if console.is_terminal else PlainConsole(stderr=stderr, width=_LOG_WIDTH)
