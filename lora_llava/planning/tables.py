"""Tables a person reads before a run."""

from __future__ import annotations

from collections.abc import Sequence

from lora_llava.modeling.structure import PartRow
from lora_llava.system.table import Column, FittingTable


def parameter_table_view(rows: Sequence[PartRow], title: str) -> FittingTable:
    """Lay out what each part of a built model holds."""
    columns = [
        Column("part", is_number=False),
        Column("parameters"),
        Column("trained"),
        Column("in 4 bits", importance=3),
        Column("adapter", importance=4),
        Column("types", is_number=False, importance=2),
        Column("MiB", importance=1),
    ]
    table = FittingTable(title, columns)
    for row in rows:
        counts = (row.total, row.trainable, row.quantized, row.adapter)
        numbers = [f"{count:,}" if count else "-" for count in counts]
        table.add(short_part(row.part), *numbers, row.dtypes, mebibytes(row.bytes))
    return table


def short_part(part: str) -> str:
    """Name a part of the model without what all of them begin with."""
    return part.removeprefix("model.")


def mebibytes(size: int) -> str:
    """Write bytes as mebibytes."""
    return f"{size / 2**20:,.1f}"
