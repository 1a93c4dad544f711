"""Rows of trees as tensors, by hand."""

from __future__ import annotations

import pytest

from lora_llava.conversation import IGNORE_INDEX, Encoded
from lora_llava.data.batch import build_row
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
    assert row["predict_positions"].tolist() == [2, 1, 5]
    assert row["shift_labels"].tolist() == row["labels"].tolist() == [4, 5, 7]
    assert row["segments"].tolist() == [[0, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 2, 1, 1]]
