"""Tables that fit the terminal: what there is no room for is left out whole, and named; nothing is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

MUST = 0
"""Importance of a column that is never left out."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a `FittingTable`."""

    heading: str
    is_number: bool = True
    """Numbers stand to the right."""
    importance: int = MUST
    """The column with the highest value is left out first."""


@dataclass(slots=True)
class FittingTable:
    """A table that leaves columns out, and then folds its texts, until it fits."""

    title: str
    columns: Sequence[Column]
    rows: list[tuple[list[str], bool]] = field(default_factory=list)
    """Cells, and whether the row is a total, set off from those before it."""

    def add(self, *cells: str, is_total: bool = False) -> None:
        """Add a row; markup in it is shown as it is."""
        assert len(cells) == len(self.columns)
        self.rows.append((list(cells), is_total))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay the table out for rich."""
        from rich.measure import Measurement
        from rich.text import Text

        kept = list(range(len(self.columns)))
        while True:
            droppable = [place for place in kept if self.columns[place].importance > MUST]
            wide = options.update(max_width=10_000)
            if Measurement.get(console, wide, self._table(kept)).maximum <= options.max_width or not droppable:
                break
            # The least important first.
            kept.remove(max(droppable, key=lambda place: self.columns[place].importance))
        yield Text(self.title, style="italic")
        yield self._table(kept)
        left_out = [column.heading for place, column in enumerate(self.columns) if place not in kept]
        if left_out:
            yield Text(f"Without room in this terminal: {' '.join(', '.join(left_out).split())}", style="dim")

    def _table(self, kept: Sequence[int]) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        has_heading = any(column.heading for column in self.columns)
        table = Table(show_header=has_heading, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        for place in kept:
            column = self.columns[place]
            # Only texts fold; a number that is cut is another number.
            table.add_column(
                Text(self._shown(place, column.heading)),
                no_wrap=column.is_number,
                overflow="ignore" if column.is_number else "fold",
            )
        for number, (cells, is_total) in enumerate(self.rows):
            ends = number + 1 < len(self.rows) and self.rows[number + 1][1]
            shown = [Text(self._shown(place, cells[place])) for place in kept]
            table.add_row(*shown, end_section=ends, style="bold" if is_total else None)
        return table

    def _shown(self, place: int, cell: str) -> str:
        """Put the lines of a number to the right; rich does not where it must not cut."""
        column = self.columns[place]
        if not column.is_number:
            return cell
        width = max(
            len(line) for one in (column.heading, *(row[place] for row, _ in self.rows)) for line in one.split("\n")
        )
        return "\n".join(line.rjust(width) for line in cell.split("\n"))


def markdown_table(heading: Sequence[str], rows: Sequence[Sequence[str]], *, align: bool = False) -> str:
    """Return a Markdown table. `align`: pad cells to line up as plain text, right-aligned but for the first column."""
    lines = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in line] for line in (heading, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["---"] * len(heading)
    if align:
        lines = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
        lines = [[line[0].strip().ljust(widths[0]), *line[1:]] for line in lines]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))
