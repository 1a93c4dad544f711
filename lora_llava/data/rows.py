"""Rows of the plan as tensors. Shapes: T tokens of a row, I images of H = W pixels; `layout` has the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from lora_llava.conversation.encode import Encoded
from lora_llava.data.images.read import open_image, preprocess
from lora_llava.data.layout import lay_out
from lora_llava.data.load import Record
from lora_llava.data.packing import Row
from lora_llava.recipe.stages import AspectRatio

Batch = dict[str, torch.Tensor]
"""Inputs of one forward pass; see `lay_out`."""
ReadImage = Callable[[Record], torch.Tensor]
"""Returns the image of a record as `pixel_values`, by an `ImageTransform`, or as cached features."""


@dataclass(frozen=True, slots=True)
class ImageTransform:
    """How pixels become `pixel_values`; the same in training, evaluation, chat and export."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    aspect_ratio: AspectRatio

    def __call__(self, record: Record) -> torch.Tensor:
        """Read the image of `record`, which must have one, as (3, size, size) fp32."""
        assert record.image is not None
        image = open_image(record.image)
        return preprocess(image, size=self.size, mean=self.mean, std=self.std, aspect_ratio=self.aspect_ratio)


class PackedRows(Dataset[Batch]):
    """The rows of a plan, in its order; images are decoded when a row is read."""

    def __init__(
        self, rows: Sequence[Row], records: Sequence[Record], encoded: Sequence[Encoded], read_image: ReadImage
    ) -> None:
        self.rows = rows
        self.records = records
        self.encoded = encoded
        self.read_image = read_image

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """Build a row, with `pixel_values` (I, 3, H, W) if it has images; see `lay_out`. An empty row has T = 0."""
        row = self.rows[index]
        batch = build_row([[self.encoded[index] for index in tree] for tree in row])
        images = [self.read_image(self.records[tree[0]]) for tree in row if self.records[tree[0]].image is not None]
        if images:
            batch["pixel_values"] = torch.stack(images)
        return batch


def build_row(trees: Sequence[Sequence[Encoded]]) -> Batch:
    """Return the arrays of `lay_out` as tensors."""
    return {name: torch.from_numpy(array) for name, array in lay_out(trees).items()}
