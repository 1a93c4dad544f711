"""Rows of trees as tensors, by hand."""

from __future__ import annotations

import pytest
import torch

from lora_llava.conversation.encode import IGNORE_INDEX, Encoded
from lora_llava.data.rows import build_row
from tests.parity.test_packed import branches, conversation


def test_conversations_that_do_not_share_a_prefix_are_no_tree() -> None:
    other = conversation("Look at this.", "yes")
    with pytest.raises(ValueError, match="share their prefix"):
        build_row([[*branches(1), other]])


def test_row_by_hand() -> None:
    # Two branches (3, 4 / 5) after a prefix of two tokens (1, 2); then a text (6, 7).
    skip = IGNORE_INDEX
    tree = [Encoded([1, 2, 3, 4], [skip, skip, skip, 4], 2), Encoded([1, 2, 5], [skip, skip, 5], 2)]
    text = [Encoded([6, 7], [skip, 7], 0)]
    row = build_row([tree, text])
    assert row["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert row["target_positions"].tolist() == [2, 1, 5]
    assert row["shift_labels"].tolist() == [4, 5, 7]
    assert row["segments"].tolist() == [[0, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 2, 1, 1]]
    assert row["tree_spans"].tolist() == [[0, 4, 5], [5, 7, 7]]
    assert row["unique_target_positions"].tolist() == [1, 2, 5]
    assert "answers" not in row


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(Encoded([1, 9, 5], [IGNORE_INDEX] * 2 + [5], 2), id="other tokens, same length"),
        pytest.param(Encoded([1, 2, 5], [IGNORE_INDEX] * 2 + [5], 1), id="same tokens, other length"),
    ],
)
def test_k32_a_prefix_is_shared_in_tokens_and_in_length(other: Encoded) -> None:
    first = Encoded([1, 2, 3], [IGNORE_INDEX, IGNORE_INDEX, 3], 2)
    with pytest.raises(ValueError, match="share their prefix"):
        build_row([[first, other]])


def test_k32_the_first_token_of_a_row_is_predicted_by_nothing() -> None:
    row = build_row([[Encoded([6, 7], [6, 7], 0)]])
    assert row["target_positions"].tolist() == [0]
    assert row["shift_labels"].tolist() == [7]


def test_k32_an_empty_row_has_the_types_and_shapes_of_any_other() -> None:
    row = build_row([])
    assert {tensor.dtype for tensor in row.values()} == {torch.long}
    shapes = {name: tuple(tensor.shape) for name, tensor in row.items()}
    assert shapes == {
        "input_ids": (1, 0),
        "position_ids": (1, 0),
        "segments": (2, 0),
        "tree_spans": (0, 3),
        "target_positions": (0,),
        "unique_target_positions": (0,),
        "shift_labels": (0,),
    }
