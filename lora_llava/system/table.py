"""Tables that fit the terminal: columns that do not fit are dropped and named; no cell is cut off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

MUST = 0
"""Importance of a column that is never dropped."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a `FittingTable`."""

    heading: str
    is_number: bool = True
    """Numbers are right-aligned."""
    importance: int = MUST
    """The column with the highest value is dropped first."""


@dataclass(slots=True)
class FittingTable:
    """A table that drops columns, and then wraps texts, until it fits."""

    title: str
    columns: Sequence[Column]
    rows: list[tuple[list[str], bool]] = field(default_factory=list)
    """Cells, and whether the row is a total, which is separated from the rows before it."""

    def add(self, *cells: str, is_total: bool = False) -> None:
        """Add a row; markup in it is printed literally."""
        assert len(cells) == len(self.columns)
        self.rows.append((list(cells), is_total))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the table for rich."""
        from rich.measure import Measurement
        from rich.text import Text

        shown = list(range(len(self.columns)))
        while True:
            droppable = [index for index in shown if self.columns[index].importance > MUST]
            wide = options.update(max_width=10_000)
            if Measurement.get(console, wide, self._table(shown)).maximum <= options.max_width or not droppable:
                break
            # Drop the least important column first.
            shown.remove(max(droppable, key=lambda index: self.columns[index].importance))
        yield Text(self.title, style="italic")
        yield self._table(shown)
        dropped = [column.heading for index, column in enumerate(self.columns) if index not in shown]
        if dropped:
            yield Text(f"Columns that do not fit: {' '.join(', '.join(dropped).split())}", style="dim")

    def _table(self, shown: Sequence[int]) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        has_heading = any(column.heading for column in self.columns)
        table = Table(show_header=has_heading, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        for index in shown:
            column = self.columns[index]
            # Wrap only texts: a number that is cut off reads as another number.
            table.add_column(
                Text(self._aligned(index, column.heading)),
                no_wrap=column.is_number,
                overflow="ignore" if column.is_number else "fold",
            )
        for row, (cells, is_total) in enumerate(self.rows):
            ends = row + 1 < len(self.rows) and self.rows[row + 1][1]
            texts = [Text(self._aligned(index, cells[index])) for index in shown]
            table.add_row(*texts, end_section=ends, style="bold" if is_total else None)
        return table

    def _aligned(self, index: int, cell: str) -> str:
        """Right-align the lines of a number, which rich does not do with overflow="ignore"."""
        column = self.columns[index]
        if not column.is_number:
            return cell
        width = max(
            len(line) for text in (column.heading, *(row[index] for row, _ in self.rows)) for line in text.split("\n")
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
