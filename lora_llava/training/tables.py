"""Tables a person reads before a run."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from lora_llava.modeling.structure import PartRow


def parameter_table_view(rows: Sequence[PartRow], title: str) -> Table:
    """Lay out what each part of a built model holds."""
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    for heading in ("parameters", "trained", "in 4 bits", "adapter"):
        table.add_column(heading, justify="right")
    table.add_column("types")
    table.add_column("MiB", justify="right")
    for row in rows:
        counts = (row.total, row.trainable, row.quantized, row.adapter)
        table.add_row(row.part, *(f"{count:,}" if count else "-" for count in counts), row.dtypes, mebibytes(row.bytes))
    return table


def mebibytes(size: int) -> str:
    """Write bytes as mebibytes."""
    return f"{size / 2**20:,.1f}"
