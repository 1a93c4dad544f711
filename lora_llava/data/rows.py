"""Rows of a plan as arrays and tensors. Shapes: T tokens of a row, S supervised tokens, I images, H = W pixels.

PyTorch is imported inside the functions that return tensors: `check` and `inspect` lay rows out without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lora_llava.conversation.encode import IGNORE_INDEX, Encoded
from lora_llava.data.images.read import open_image, preprocess
from lora_llava.data.packing import Row, conversations
from lora_llava.data.record import Record
from lora_llava.recipe.stages import AspectRatio

if TYPE_CHECKING:
    import torch

Layout = dict[str, npt.NDArray[np.int64]]
"""The arrays of a row by name:

- `input_ids`, `position_ids` (1, T);
- `segments` (2, T): the number of each token's tree, and of its branch in that tree (0: the prefix). A token sees the
  earlier tokens of its own branch and of its tree's prefix;
- `tree_spans` (trees, 3): where each tree starts, where its first branch ends, where the tree ends;
- `target_positions` (S,): positions whose logits predict `shift_labels`;
- `unique_target_positions`: the same positions, sorted, each once: the branches of a tree share some;
- `shift_labels` (S,): the token ids to predict;
- `answers` (S,), in a row of preference pairs: the number of the answer that each target belongs to, 2 p for the chosen
  one of pair p and 2 p + 1 for the rejected one. A pair is a tree of two branches, and P is the number of pairs.
"""
Batch = dict[str, "torch.Tensor"]
"""The tensors of one forward pass: those of `lay_out`; `pixel_values` (I, 3, H, W) if the row has images; for pairs
`reference` (P, 2), once it is known: log-probabilities of the chosen and the rejected answer by the starting model; of
several sources `sources` (S,), of pairs (P,): the number of the source of each target or pair."""
ReadImage = Callable[[Record], "torch.Tensor"]
"""Turns the image of a record into the model's input: an `ImageTransform`, or a cache of features."""


def lay_out(trees: Sequence[Sequence[Encoded]]) -> Layout:
    """Lay trees end to end in one sequence; see `Layout`.

    Contract: `position_ids` restart at 0 with each tree, and at the prefix length with each branch, so each
    conversation computes what it would compute in a row by itself. Raises ValueError if the conversations of a tree
    do not share their prefix.
    """
    input_ids: list[int] = []
    position_ids: list[int] = []
    tree_numbers: list[int] = []
    branch_numbers: list[int] = []
    spans: list[tuple[int, int, int]] = []
    target_positions: list[int] = []
    shift_labels: list[int] = []
    for tree_number, tree in enumerate(map(_branches, trees)):
        # The prefix, once for all branches.
        prefix_length = tree[0].prefix_length
        prefix = tree[0].input_ids[:prefix_length]
        tree_start = len(input_ids)
        input_ids += prefix
        position_ids += range(prefix_length)
        branch_numbers += [0] * prefix_length

        for branch_number, branch in enumerate(tree, start=1):
            if branch.input_ids[:prefix_length] != prefix or branch.prefix_length != prefix_length:
                raise ValueError("conversations of one tree must share their prefix")

            # Targets: the prefix is at the start of the tree, the rest of the conversation at the end of the row.
            branch_offset = len(input_ids) - prefix_length
            for position, label in _predictions(branch):
                target_positions.append((tree_start if position < prefix_length else branch_offset) + position)
                shift_labels.append(label)

            # The branch: what follows the prefix.
            input_ids += branch.input_ids[prefix_length:]
            position_ids += range(prefix_length, len(branch.input_ids))
            branch_numbers += [branch_number] * (len(branch.input_ids) - prefix_length)
        tree_numbers += [tree_number] * (len(input_ids) - tree_start)
        spans.append((tree_start, tree_start + len(tree[0].input_ids), len(input_ids)))
    return {
        "input_ids": _int64([input_ids]),
        "position_ids": _int64([position_ids]),
        "segments": _int64([tree_numbers, branch_numbers]),
        "tree_spans": _int64(spans).reshape(-1, 3),
        "target_positions": _int64(target_positions),
        "unique_target_positions": np.unique(_int64(target_positions)),
        "shift_labels": _int64(shift_labels),
        **_answers(trees),
    }


def _branches(tree: Sequence[Encoded]) -> list[Encoded]:
    """List the conversations of a tree; a pair has two."""
    return [branch for encoded in tree for branch in encoded.branches]


def _answers(trees: Sequence[Sequence[Encoded]]) -> Layout:
    """Number the answer of each target in a row of pairs; {} for other rows."""
    answers = (answer for tree in trees for pair in tree if pair.rejected is not None for answer in pair.branches)
    numbers = [number for number, answer in enumerate(answers) for _ in range(answer.num_supervised)]
    return {"answers": _int64(numbers)} if numbers else {}


def _int64(values: Sequence[object]) -> npt.NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def _predictions(encoded: Encoded) -> Iterator[tuple[int, int]]:
    """Yield, for each supervised token of a conversation, the position that predicts it and its id.

    The prefix of a pair may end with supervised tokens: the beginning of both answers, which counts for each.
    """
    for position, label in enumerate(encoded.labels[1:]):
        if label != IGNORE_INDEX:
            yield position, label


def build_row(trees: Sequence[Sequence[Encoded]]) -> Batch:
    """Return the arrays of `lay_out` as tensors of the same names and shapes."""
    import torch

    return {name: torch.from_numpy(array) for name, array in lay_out(trees).items()}


@dataclass(frozen=True, slots=True)
class ImageTransform:
    """Turns pixels into `pixel_values`; the same in training, evaluation, chat and export."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    aspect_ratio: AspectRatio

    def __call__(self, record: Record) -> torch.Tensor:
        """Read the image of `record`, which must have one, as (3, size, size) fp32."""
        assert record.image is not None
        image = open_image(record.image)
        return preprocess(image, size=self.size, mean=self.mean, std=self.std, aspect_ratio=self.aspect_ratio)


class PackedRows:
    """The rows of a plan, in its order, as a map-style dataset; images are decoded when a row is requested."""

    def __init__(
        self,
        rows: Sequence[Row],
        records: Sequence[Record],
        encoded: Sequence[Encoded],
        read_image: ReadImage,
        sources: Sequence[str] = (),
    ) -> None:
        """`sources`: names of the sources that the batches tell apart; (): they do not."""
        self.sources = sources
        self.rows = rows
        self.records = records
        self.encoded = encoded
        self.read_image = read_image

    def with_rows(self, rows: Sequence[Row]) -> PackedRows:
        """Return other rows over the same records; their batches do not tell the sources apart."""
        return PackedRows(rows, self.records, self.encoded, self.read_image)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """Build a row; see `Batch`. An empty row has T = 0."""
        import torch

        row = self.rows[index]
        trees = [[self.encoded[index] for index in tree] for tree in row]
        batch = build_row(trees)
        if references := [pair.reference for tree in trees for pair in tree if pair.reference is not None]:
            batch["reference"] = torch.tensor(references, dtype=torch.float64)
        if self.sources:
            batch["sources"] = torch.tensor(self._sources_of(row), dtype=torch.int64)
        # One image for each tree: its conversations share it.
        first_records = [self.records[tree[0]] for tree in row]
        if images := [self.read_image(record) for record in first_records if record.image is not None]:
            batch["pixel_values"] = torch.stack(images)
        return batch

    def _sources_of(self, row: Row) -> list[int]:
        """Return the number of the source of each target of a row, or of each pair."""
        numbers: list[int] = []
        for index in conversations([row]):
            encoded, number = self.encoded[index], self.sources.index(self.records[index].source)
            numbers += [number] * (1 if encoded.rejected is not None else encoded.num_supervised)
        return numbers
