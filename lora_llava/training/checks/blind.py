"""Measure how much the images lower the validation loss: compare with the mean color in place of each image.

A model can learn to answer from the question alone, and its loss still falls. The loss without images shows it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from lora_llava.data.images.read import mean_color, preprocess
from lora_llava.data.packing import PlanItem, Row, Tree, conversations, plan_in_order, tree_length
from lora_llava.data.rows import ImageTransform, PackedRows
from lora_llava.data.sampling import spread
from lora_llava.training.checks.check import Check, MeanLoss, ValidationPass
from lora_llava.training.validation import without

MAX_CONVERSATIONS, MAX_IMAGES = 64, 32
"""Maximum size of the sample, which each validation computes twice, or once if it is all of the validation data."""


@dataclass(frozen=True, slots=True)
class ImageCheck:
    """The same conversations twice: with their images, and with the mean color instead."""

    true: PackedRows
    blind: PackedRows
    is_whole: bool
    """Whether they are all of the validation data."""

    def measure(self, mean_loss: MeanLoss, whole: float) -> dict[str, float]:
        """Return `eval_loss_blind`, and `image_gain`: how far it is above the loss with images. Both per token.

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
    """Choose a sample of the validation rows; None if no record has an image.

    The mean color is passed as pixels, which the model also accepts next to cached features. It is not exactly 0 after
    normalization, since a pixel is an integer; padding and the blind evaluation use the same color.
    """
    sample = sample_rows(rows)
    if not sample:
        return None
    size, mean = transform.size, transform.mean
    nothing = preprocess(
        mean_color(size, mean), size=size, mean=mean, std=transform.std, aspect_ratio=transform.aspect_ratio
    )
    return ImageCheck(
        rows.with_rows(sample),
        PackedRows(_rows_of_one_image(rows, sample), rows.records, rows.encoded, lambda _: nothing),
        len(list(conversations(sample))) == len(list(conversations(rows.rows))),
    )


def sample_rows(rows: PackedRows) -> list[Row]:
    """Take trees with images, spread evenly over the rows, each within its row, which is then no longer than before."""
    trees = [
        (number, tree)
        for number, row in enumerate(rows.rows)
        for tree in row
        if rows.records[tree[0]].image is not None
    ]
    sample = spread(trees, MAX_IMAGES)
    trees_by_row: dict[int, list[Tree]] = {}
    left = MAX_CONVERSATIONS
    for index, (number, tree) in enumerate(sample):
        # Each tree that is still to come gets one conversation at least.
        part = tree[: max(1, left // (len(sample) - index))]
        left -= len(part)
        trees_by_row.setdefault(number, []).append(part)
    return [tuple(trees) for trees in trees_by_row.values()]


def _rows_of_one_image(rows: PackedRows, sample: Sequence[Row]) -> list[Row]:
    """Pack the conversations of `sample` as if all were about one image; no row is longer than the longest of them.

    With the mean color in place of every image, conversations with the same tokens before it share their prefix, so it
    is computed once.
    """
    indices = list(conversations(sample))
    items: list[PlanItem] = []
    group_of: dict[tuple[int, ...], int] = {}
    for index in indices:
        encoded = rows.encoded[index]
        prefix = tuple(encoded.input_ids[: encoded.prefix_length])
        group = group_of.setdefault(prefix, len(group_of))
        items.append(PlanItem(len(encoded.input_ids), encoded.prefix_length, group))

    item_of = dict(zip(indices, items, strict=True))
    lengths = [sum(tree_length(range(len(tree)), [item_of[index] for index in tree]) for tree in row) for row in sample]
    return plan_in_order(items, tokens_per_row=max(lengths), indices=indices)
