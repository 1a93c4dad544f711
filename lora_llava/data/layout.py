"""The arrays of one row, without PyTorch. Shapes: T tokens of a row, S supervised targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from lora_llava.conversation.encode import IGNORE_INDEX, Encoded

Layout = dict[str, npt.NDArray[np.int64]]
"""What `lay_out` returns, by name."""


def lay_out(trees: Sequence[Sequence[Encoded]]) -> Layout:
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
    places, labels = _ids(predict), _ids(targets)
    return {
        "input_ids": _ids([input_ids]),
        "position_ids": _ids([position_ids]),
        "segments": _ids([tree_numbers, branch_numbers]),
        "tree_spans": _ids(spans).reshape(-1, 3),
        "predict_positions": places,
        "predicting_places": np.unique(places),
        "labels": labels,
        "shift_labels": labels,
    }


def _ids(values: Sequence[object]) -> npt.NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def _predictions(encoded: Encoded) -> Iterator[tuple[int, int]]:
    """Yield each supervised token of a conversation, and before it the place that predicts it."""
    for place in range(max(encoded.prefix_length, 1), len(encoded.input_ids)):
        if encoded.labels[place] != IGNORE_INDEX:
            yield place - 1, encoded.labels[place]
