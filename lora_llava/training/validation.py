"""Compute the validation loss; a record whose loss is NaN or infinite is excluded and reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from lora_llava.data.packing import Row, conversations
from lora_llava.data.rows import Batch, PackedRows, ReadImage
from lora_llava.system.ranks import gathered
from lora_llava.training.parallel.lockstep import own_indices

RowLoss = Callable[[Batch], torch.Tensor]
"""Computes the summed loss, a scalar, over the items of a row: its supervised tokens, or pairs."""
CountItems = Callable[[Batch], int]
"""Counts the items of a row."""


class HeldOutLoss:
    """Computes mean losses over rows, which the processes share, and collects the records whose loss is not finite."""

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

        `batches`: the tensors of the rows at `own_indices`, in the same order, as a data loader reads them, if `rows`
        are all validation rows. Without it, they are a sample: those of the last validation, with the same images, are
        not computed again.
        """
        if batches is not None:
            self._images = rows.read_image
            self._known = self._measure_all(rows, own_indices(len(rows)), batches)
        known = self._known if rows.read_image is self._images else {}
        if missing := [index for index, row in enumerate(rows.rows) if row not in known]:
            share = [missing[number] for number in own_indices(len(missing))]
            known = known | self._measure_all(rows, share, (rows[index] for index in share))
        # In the order of the rows, so that the sum does not depend on the number of processes.
        total, count = 0.0, 0
        for row in rows.rows:
            loss, items = known[row]
            total, count = total + loss, count + items
        return total / count if count else None

    def by_source(self, rows: PackedRows) -> dict[str, float]:
        """Return the mean loss of each source as `eval_loss/NAME`, if the last validation had several."""
        sources: dict[str, list[Row]] = {}
        for row in rows.rows:
            sources.setdefault(rows.records[row[0][0]].source, []).append(row)
        if len(sources) < 2:
            return {}
        losses = {name: self.mean(rows.with_rows(own)) for name, own in sources.items()}
        return {f"eval_loss/{name}": loss for name, loss in losses.items() if loss is not None}

    def _measure_all(
        self, rows: PackedRows, own: Sequence[int], batches: Iterable[Batch]
    ) -> dict[Row, tuple[float, int]]:
        """Measure the rows of this process, those at `own`, and return the figures of the rows of all processes."""
        measured = [(self.row_loss(batch), self.count_items(batch)) for batch in batches]
        # Read together, so that the device does not wait for the host between rows.
        losses = torch.stack([loss for loss, _ in measured]).tolist() if measured else []
        figures = {
            rows.rows[index]: (loss, count) if math.isfinite(loss) else self._finite_part(rows, rows.rows[index])
            for index, loss, (_, count) in zip(own, losses, measured, strict=True)
        }
        for others, unusable in gathered((figures, self.unusable)):
            figures = figures | others
            self.unusable = self.unusable | unusable
        return figures

    def _finite_part(self, rows: PackedRows, row: Row) -> tuple[float, int]:
        """Sum the losses and items of a row's conversations one by one, without those that are not finite: unusable."""
        total, count = 0.0, 0
        for index in conversations([row]):
            alone = rows.with_rows([((index,),)])[0]
            loss = float(self.row_loss(alone))
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
    return rows.with_rows([row for row in kept if row])
