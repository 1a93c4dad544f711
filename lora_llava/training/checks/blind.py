"""Does the model look? Its loss on a few validation conversations, with their images and with the mean colour instead.

A model can answer from the question alone, and its loss falls all the same. What the images are worth to it is what it
loses without them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from lora_llava.data.images.read import mean_color, preprocess
from lora_llava.data.packing import Row, Tree
from lora_llava.data.rows import ImageTransform, PackedRows
from lora_llava.data.sampling import spread
from lora_llava.training.checks.check import Check, MeanLoss, ValidationPass
from lora_llava.training.validation import without

MOST_CONVERSATIONS, MOST_IMAGES = 64, 32
"""Bounds of the sample, which is computed twice at each validation, or once if it is all of it."""


@dataclass(frozen=True, slots=True)
class ImageCheck:
    """The same conversations twice: with their images, and blind."""

    true: PackedRows
    blind: PackedRows
    is_whole: bool
    """Whether they are all of the validation."""

    def measure(self, mean_loss: MeanLoss, whole: float) -> dict[str, float]:
        """Return `eval_loss_blind`, and as `image_gain` what it is above the loss with the images, a token.

        `whole`: the loss over all validation rows.
        """
        true = whole if self.is_whole else mean_loss(self.true)
        blind = mean_loss(self.blind)
        return {} if true is None or blind is None else {"eval_loss_blind": blind, "image_gain": blind - true}

    def without(self, indices: Collection[int]) -> ImageCheck | None:
        """Return the check without some records; None if no row is left."""
        true, blind = (without(rows, indices) for rows in (self.true, self.blind))
        return replace(self, true=true, blind=blind) if len(true) else None


class BlindCheck(Check):
    """Measures at each validation what the images are worth; `sample` is None when no record with an image is left."""

    def __init__(self, sample: ImageCheck | None) -> None:
        self.sample = sample

    def on_validation(self, validation: ValidationPass) -> None:
        """Add `eval_loss_blind` and `image_gain`."""
        if self.sample is not None and validation.unusable:
            self.sample = self.sample.without(validation.unusable)
        if self.sample is not None and validation.loss is not None:
            validation.metrics |= self.sample.measure(validation.mean_loss, validation.loss)


def make_image_check(rows: PackedRows, transform: ImageTransform) -> ImageCheck | None:
    """Choose a sample of validation rows; None if they hold no image.

    The mean colour comes as pixels, which the model takes where it is fed cached features too. It is not quite 0 after
    normalisation, since a pixel is a whole number; it is what padding shows, and what evaluation calls blind.
    """
    sample = sample_rows(rows)
    if not sample:
        return None
    size, mean = transform.size, transform.mean
    nothing = preprocess(
        mean_color(size, mean), size=size, mean=mean, std=transform.std, aspect_ratio=transform.aspect_ratio
    )

    return ImageCheck(
        PackedRows(sample, rows.records, rows.encoded, rows.read_image),
        PackedRows(sample, rows.records, rows.encoded, lambda _: nothing),
        count_conversations(sample) == count_conversations(rows.rows),
    )


def sample_rows(rows: PackedRows) -> list[Row]:
    """Take trees with images, spread evenly over the rows, each within its row, which is then no longer than before."""
    places = [
        (number, tree)
        for number, row in enumerate(rows.rows)
        for tree in row
        if rows.records[tree[0]].image is not None
    ]
    sample = spread(places, MOST_IMAGES)
    chosen: dict[int, list[Tree]] = {}
    left = MOST_CONVERSATIONS
    for index, (number, tree) in enumerate(sample):
        # Each tree that is still to come gets one conversation at least.
        part = tree[: max(1, left // (len(sample) - index))]
        left -= len(part)
        chosen.setdefault(number, []).append(part)
    return [tuple(trees) for trees in chosen.values()]


def count_conversations(rows: Sequence[Row]) -> int:
    """Count the conversations of rows."""
    return sum(len(tree) for row in rows for tree in row)
