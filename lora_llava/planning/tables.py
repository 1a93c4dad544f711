"""Tables printed before a run."""

from __future__ import annotations

from collections.abc import Sequence

from lora_llava.modeling.structure import PartParameters
from lora_llava.system.table import Column, FittingTable


def parameter_table_view(parts: Sequence[PartParameters], title: str) -> FittingTable:
    """Lay out the parameters of each part of a model."""
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
    for part in parts:
        counts = (part.total, part.trainable, part.quantized, part.adapter)
        numbers = [f"{count:,}" if count else "-" for count in counts]
        table.add(short_part(part.part), *numbers, part.dtypes, mebibytes(part.bytes))
    return table


def short_part(part: str) -> str:
    """Shorten the name of a part by the prefix that all of them share."""
    return part.removeprefix("model.")


def mebibytes(size: int) -> str:
    """Format bytes as MiB."""
    return f"{size / 2**20:,.1f}"
