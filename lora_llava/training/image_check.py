"""Does the model look? Its loss on a few validation conversations, with their images and with the mean colour instead.

A model can answer from the question alone, and its loss falls all the same. What the images are worth to it is what it
loses without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from lora_llava.data.batch import Batch, ImageTransform, PackedRows
from lora_llava.data.images import mean_colour, preprocess
from lora_llava.data.packing import Row, Tree

MOST_CONVERSATIONS, MOST_IMAGES = 64, 32
"""Bounds of the sample, which is computed twice at each validation, or once if it is all of it."""
LEAST_GAIN = 0.01
"""Share of its loss that a model which looks owes to the images."""

MeanLoss = Callable[[Iterable[Batch]], float]
"""Computes the mean loss over the supervised tokens of rows."""


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
        true = whole if self.is_whole else mean_loss(each(self.true))
        blind = mean_loss(each(self.blind))
        return {"eval_loss_blind": blind, "image_gain": blind - true}


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
        mean_colour(size, mean), size=size, mean=mean, std=transform.std, aspect_ratio=transform.aspect_ratio
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
    count = min(len(places), MOST_IMAGES)
    chosen: dict[int, list[Tree]] = {}
    left = MOST_CONVERSATIONS
    for place in range(count):
        number, tree = places[place * len(places) // count]
        # Each tree that is still to come gets one conversation at least.
        part = tree[: max(1, left // (count - place))]
        left -= len(part)
        chosen.setdefault(number, []).append(part)
    return [tuple(trees) for trees in chosen.values()]


def count_conversations(rows: Sequence[Row]) -> int:
    """Count the conversations of rows."""
    return sum(len(tree) for row in rows for tree in row)


def each(rows: PackedRows) -> Iterator[Batch]:
    """Read rows one after another, in this process."""
    for index in range(len(rows)):
        yield rows[index]


def not_looking(metrics: dict[str, float], step: int, max_steps: int) -> str | None:
    """Say so if the model gains nothing by its images in the second half of a stage; before, it may yet learn to."""
    blind, gain = metrics["eval_loss_blind"], metrics["image_gain"]
    # Not "less": a NaN is no proof of looking.
    if 2 * step < max_steps or gain >= LEAST_GAIN * (blind - gain):
        return None
    return (
        f"the model does not look at the images: its validation loss is {blind - gain:.4f} with them, and {blind:.4f} "
        "with the mean colour in place of each. Look with lora-llava check whether the images belong to their "
        "questions; if they do, train longer, align first of all, or raise the projector's learning rate"
    )
