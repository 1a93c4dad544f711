"""Rows of the plan as tensors. Shapes: T tokens of a row, S supervised targets, I images, H = W pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from lora_llava.conversation import IGNORE_INDEX, Encoded
from lora_llava.data.images import open_image, preprocess
from lora_llava.data.packing import Row
from lora_llava.data.records import Record
from lora_llava.recipe_stages import AspectRatio

Batch = dict[str, torch.Tensor]
"""What one forward pass takes; see `build_row`."""
ReadImage = Callable[[Record], torch.Tensor]
"""Turns the image of a record into what the model takes: an `ImageTransform`, or features cached in its place."""


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
    """The rows of a plan, in its order; images are decoded when a row is asked for."""

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
        """Build a row, with `pixel_values` (I, 3, H, W) if it has images; see `build_row`. An empty row has T = 0."""
        row = self.rows[index]
        batch = build_row([[self.encoded[index] for index in tree] for tree in row])
        images = [self.read_image(self.records[tree[0]]) for tree in row if self.records[tree[0]].image is not None]
        if images:
            batch["pixel_values"] = torch.stack(images)
        return batch


def build_row(trees: Sequence[Sequence[Encoded]]) -> Batch:
    """Lay trees back to back in one sequence.

    Returns `input_ids` and `position_ids` (1, T); `segments` (2, T), the number of each token's tree and, within it,
    of its branch (0: the prefix): a token sees the earlier ones of its own conversation and of its tree's prefix;
    `tree_spans` (trees, 3), where each tree begins, where its first branch ends, and where it ends itself;
    `predict_positions` (S,), the places whose logits are compared with `shift_labels` (S,), token ids;
    `predicting_places`, the same, each once. `labels` is `shift_labels` under the name that the Trainer counts.

    Contract: positions restart at 0 for each tree and, for each branch, at the prefix length, so every
    conversation computes what it would compute alone.
    """
    input_ids: list[int] = []
    position_ids: list[int] = []
    tree_numbers: list[int] = []
    branch_numbers: list[int] = []
    spans: list[tuple[int, int, int]] = []
    predict: list[int] = []
    targets: list[int] = []
    for number, tree in enumerate(trees):
        prefix_length = tree[0].prefix_length
        prefix = tree[0].input_ids[:prefix_length]
        start = len(input_ids)
        input_ids += prefix
        position_ids += range(prefix_length)
        branch_numbers += [0] * prefix_length
        for branch_number, branch in enumerate(tree, start=1):
            if branch.input_ids[:prefix_length] != prefix or branch.prefix_length != prefix_length:
                raise ValueError("conversations of one tree must share their prefix")
            own_start = len(input_ids) - prefix_length
            for place, target in _predictions(branch):
                predict.append((start if place < prefix_length else own_start) + place)
                targets.append(target)
            input_ids += branch.input_ids[prefix_length:]
            position_ids += range(prefix_length, len(branch.input_ids))
            branch_numbers += [branch_number] * (len(branch.input_ids) - prefix_length)
        tree_numbers += [number] * (len(input_ids) - start)
        spans.append((start, start + len(tree[0].input_ids), len(input_ids)))
    places, labels = torch.tensor(predict, dtype=torch.long), torch.tensor(targets, dtype=torch.long)
    return {
        "input_ids": torch.tensor([input_ids], dtype=torch.long),
        "position_ids": torch.tensor([position_ids], dtype=torch.long),
        "segments": torch.tensor([tree_numbers, branch_numbers], dtype=torch.long),
        "tree_spans": torch.tensor(spans, dtype=torch.long).reshape(-1, 3),
        "predict_positions": places,
        "predicting_places": places.unique(),
        "labels": labels,
        "shift_labels": labels,
    }


def _predictions(encoded: Encoded) -> Iterator[tuple[int, int]]:
    """Yield each supervised token of a conversation, and before it the place that predicts it."""
    for place in range(max(encoded.prefix_length, 1), len(encoded.input_ids)):
        if encoded.labels[place] != IGNORE_INDEX:
            yield place - 1, encoded.labels[place]
