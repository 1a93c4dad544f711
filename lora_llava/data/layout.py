"""The arrays of one row. Shapes: T tokens of a row, S supervised tokens.

NumPy alone, so that `inspect` shows a row without importing PyTorch; `data.rows` makes tensors of the arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from lora_llava.conversation.encode import IGNORE_INDEX, Encoded

Layout = dict[str, npt.NDArray[np.int64]]
"""The arrays of a row by name:

- `input_ids` and `position_ids` (1, T);
- `segments` (2, T): each token's tree, and its branch within the tree (0: the prefix). A token sees the earlier tokens
  of its own conversation and of its tree's prefix;
- `tree_spans` (trees, 3): start of each tree, end of its first branch, end of the tree;
- `target_positions` (S,): positions whose logits predict `shift_labels` (S,), token ids;
- `unique_target_positions`: the same, sorted and deduplicated;
- `labels`: `shift_labels` under the name that transformers' Trainer counts.
"""


def lay_out(trees: Sequence[Sequence[Encoded]]) -> Layout:
    """Lay trees back to back in one sequence; see `Layout`.

    Contract: positions restart at 0 for each tree and, for each branch, at the prefix length, so every conversation
    computes what it would compute alone. Raises ValueError if conversations of one tree do not share their prefix.
    """
    input_ids: list[int] = []
    position_ids: list[int] = []
    tree_numbers: list[int] = []
    branch_numbers: list[int] = []
    spans: list[tuple[int, int, int]] = []
    target_positions: list[int] = []
    targets: list[int] = []
    for number, tree in enumerate(trees):
        prefix_length = tree[0].prefix_length
        prefix = tree[0].input_ids[:prefix_length]
        start = len(input_ids)

        # The prefix, once.
        input_ids += prefix
        position_ids += range(prefix_length)
        branch_numbers += [0] * prefix_length

        # Each conversation's own tokens. A first own token is predicted at the prefix's last position.
        for branch_number, branch in enumerate(tree, start=1):
            if branch.input_ids[:prefix_length] != prefix or branch.prefix_length != prefix_length:
                raise ValueError("conversations of one tree must share their prefix")
            own_start = len(input_ids) - prefix_length
            for position, target in _predictions(branch):
                target_positions.append((start if position < prefix_length else own_start) + position)
                targets.append(target)
            input_ids += branch.input_ids[prefix_length:]
            position_ids += range(prefix_length, len(branch.input_ids))
            branch_numbers += [branch_number] * (len(branch.input_ids) - prefix_length)
        tree_numbers += [number] * (len(input_ids) - start)
        spans.append((start, start + len(tree[0].input_ids), len(input_ids)))
    positions, labels = _ids(target_positions), _ids(targets)
    return {
        "input_ids": _ids([input_ids]),
        "position_ids": _ids([position_ids]),
        "segments": _ids([tree_numbers, branch_numbers]),
        "tree_spans": _ids(spans).reshape(-1, 3),
        "target_positions": positions,
        "unique_target_positions": np.unique(positions),
        "labels": labels,
        "shift_labels": labels,
    }


def _ids(values: Sequence[object]) -> npt.NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def _predictions(encoded: Encoded) -> Iterator[tuple[int, int]]:
    """Yield the position that predicts each supervised token of a conversation, and the token's id."""
    for position in range(max(encoded.prefix_length, 1), len(encoded.input_ids)):
        if encoded.labels[position] != IGNORE_INDEX:
            yield position - 1, encoded.labels[position]
