"""Encoded records: what is counted beforehand is what comes out when a conversation is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_llava.conversation.encode import Turn, encode
from lora_llava.conversation.templates import get_template
from lora_llava.data.packing import PlanItem
from lora_llava.data.record import ImageSource, Record
from lora_llava.data.stage import EncodedRecords
from lora_llava.errors import DataError
from tests.helpers.tiny import IMAGE_ID, NUM_IMAGE_TOKENS, tiny_tokenizer

OPTIONS = {"image_token_id": IMAGE_ID, "num_image_tokens": NUM_IMAGE_TOKENS, "max_length": 170}


def record(image: str | None, question: str, answer: str = "yes") -> Record:
    source = None if image is None else ImageSource(image, Path(image), None)
    shown = "<image>\n" if image else ""
    return Record(question, source, (Turn("user", shown + question), Turn("assistant", answer)), f"at {question}")


def test_counts_are_those_of_what_comes_out() -> None:
    records = [record("a", "one"), record(None, "two"), record("b", "three"), record("a", "four", "no " * 90)]
    encoded = EncodedRecords(records, get_template("vicuna_v1"), tiny_tokenizer(), **OPTIONS)
    assert len(encoded) == 4
    expected = [
        encode(one.turns, get_template("vicuna_v1"), tiny_tokenizer(), where=one.where, **OPTIONS) for one in records
    ]
    assert list(encoded) == encoded[:] == [encoded[index] for index in range(4)] == expected
    assert encoded.items == [
        PlanItem(len(one.input_ids), one.prefix_length, group)
        for one, group in zip(expected, (0, -1, 1, 0), strict=True)
    ]
    assert list(encoded.num_supervised) == [one.num_supervised for one in expected]
    assert [one.is_cut for one in expected] == [False, False, False, True]
    assert encoded.num_cut == 1


def test_the_first_that_cannot_be_trained_on_is_named() -> None:
    with pytest.raises(DataError, match=r"at two: .*empty"):
        EncodedRecords(
            [record("a", "one"), record("b", "two", " "), record("b", "three", " ")],
            get_template("vicuna_v1"),
            tiny_tokenizer(),
            **OPTIONS,
        )
