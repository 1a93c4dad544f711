"""Compute the validation loss; a record whose loss is NaN or infinite is excluded and reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch

from lora_llava.data.packing import Row, conversations
from lora_llava.data.rows import Batch, PackedRows

RowLoss = Callable[[Batch], float]
"""Computes the summed loss over the supervised tokens of a row."""


class HeldOutLoss:
    """Computes mean losses over rows, and collects the records whose loss is not finite."""

    def __init__(self, row_loss: RowLoss) -> None:
        self.row_loss = row_loss
        self.unusable: dict[int, str] = {}
        """The reason that a record is unusable, by its index."""

    def mean(self, rows: PackedRows, batches: Iterable[Batch] | None = None) -> float | None:
        """Return the mean loss over the supervised tokens of `rows`; None if no record has a finite one.

        `batches`: the rows as tensors, in the same order, if a data loader reads them.
        """
        total, count = 0.0, 0
        for row, batch in zip(rows.rows, batches or _iterate_rows(rows), strict=True):
            loss, tokens = self.row_loss(batch), batch["shift_labels"].numel()
            if not math.isfinite(loss):
                loss, tokens = self._finite_part(rows, row)
            total, count = total + loss, count + tokens
        return total / count if count else None

    def _finite_part(self, rows: PackedRows, row: Row) -> tuple[float, int]:
        """Sum the losses of a row's conversations one by one, and collect those that are not finite."""
        total, count = 0.0, 0
        for index in conversations([row]):
            alone = PackedRows([((index,),)], rows.records, rows.encoded, rows.read_image)[0]
            loss = self.row_loss(alone)
            if math.isfinite(loss):
                total, count = total + loss, count + alone["shift_labels"].numel()
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


def _iterate_rows(rows: PackedRows) -> Iterator[Batch]:
    """Yield the rows one after another, read in this process."""
    for index in range(len(rows)):
        yield rows[index]
