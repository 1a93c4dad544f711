"""Compute the validation loss; a record whose loss is NaN or infinite is excluded and reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from lora_llava.data.packing import Row, conversations
from lora_llava.data.rows import Batch, PackedRows, ReadImage

RowLoss = Callable[[Batch], float]
"""Computes the summed loss over the items of a row: its supervised tokens, or pairs."""
CountItems = Callable[[Batch], int]
"""Counts the items of a row."""


class HeldOutLoss:
    """Computes mean losses over rows, and collects the records whose loss is not finite."""

    def __init__(self, row_loss: RowLoss, count_items: CountItems) -> None:
        self.row_loss = row_loss
        self.count_items = count_items
        self.unusable: dict[int, str] = {}
        """The reason that a record is unusable, by its index."""
        self._images: ReadImage | None = None
        """How the images of the last validation are read."""
        self._known: dict[Row, tuple[float, int]] = {}
        """Summed loss and number of items of each of its rows."""

    def mean(self, rows: PackedRows, batches: Iterable[Batch] | None = None) -> float | None:
        """Return the mean loss over the items of `rows`; None if no record has a finite one.

        `batches`: the tensors of all validation rows, in the same order, as a data loader reads them. Without it,
        `rows` are a sample: those of the last validation, with the same images, are not computed again.
        """
        if batches is not None:
            self._images, self._known = rows.read_image, {}
            for row, batch in zip(rows.rows, batches, strict=True):
                self._known[row] = self._measure(rows, row, batch)
        known = self._known if rows.read_image is self._images else {}
        total, count = 0.0, 0
        for index, row in enumerate(rows.rows):
            loss, items = known[row] if row in known else self._measure(rows, row, rows[index])
            total, count = total + loss, count + items
        return total / count if count else None

    def _measure(self, rows: PackedRows, row: Row, batch: Batch) -> tuple[float, int]:
        """Return the summed loss of a row and the number of its items, without the records whose loss is not finite."""
        loss = self.row_loss(batch)
        return (loss, self.count_items(batch)) if math.isfinite(loss) else self._finite_part(rows, row)

    def _finite_part(self, rows: PackedRows, row: Row) -> tuple[float, int]:
        """Sum the losses of a row's conversations one by one, and collect those that are not finite."""
        total, count = 0.0, 0
        for index in conversations([row]):
            alone = PackedRows([((index,),)], rows.records, rows.encoded, rows.read_image)[0]
            loss = self.row_loss(alone)
            if math.isfinite(loss):
                total, count = total + loss, count + self.count_items(alone)
            else:
                has_image = has_finite_image(alone)
                self.unusable[index] = "its loss is not finite" if has_image else "its image holds NaN or infinity"
        return total, count


def has_finite_image(batch: Batch) -> bool:
    """Return whether the images of a row, if any, are finite."""
    pixels = batch.get("pixel_values")
    return pixels is None or bool(torch.isfinite(pixels).all())


def without(rows: PackedRows, indices: Iterable[int]) -> PackedRows:
    """Return `rows` without the records at `indices`; rows that become empty are dropped."""
    gone = set(indices)
    trees = [[tuple(index for index in tree if index not in gone) for tree in row] for row in rows.rows]
    kept = [tuple(tree for tree in row if tree) for row in trees]
    return PackedRows([row for row in kept if row], rows.records, rows.encoded, rows.read_image)
