"""The encoder: no text of a record becomes a special token, and ids and labels keep their relations."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_llava.conversation.encode import IGNORE_INDEX, IMAGE_PLACEHOLDER, ImageTokens, Turn, encode, encode_prompt
from lora_llava.conversation.templates import TEMPLATES
from lora_llava.data.record import check_text
from lora_llava.errors import DataError
from tests.fuzz.mutations import NASTY_TEXT
from tests.helpers.tiny import BOS_ID, EOS_ID, IM_END_ID, IM_START_ID, IMAGE_ID, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PIECES = st.sampled_from(
    [*TOKENIZER.all_special_tokens, "\n", "\n\n", " ", "  ", "USER: ", " ASSISTANT:", "\u00e9", "\U0001f600"]
)
TEXTS = st.lists(NASTY_TEXT | PIECES, max_size=6).map("".join)
OPTIONS: dict[str, Any] = {"image_tokens": ImageTokens(IMAGE_ID, 4), "where": "train.json, record 1"}


def readable(text: str) -> bool:
    try:
        check_text(text, "x")
    except DataError:
        return False
    return True


@pytest.mark.fault("records: `<image>` inside an answer")
@pytest.mark.fault("records: special tokens, or `USER:` and the like, inside a text")
@given(
    texts=st.lists(TEXTS.filter(readable), min_size=1, max_size=6),
    image=st.booleans(),
    name=st.sampled_from(sorted(TEMPLATES)),
    max_length=st.integers(1, 600) | st.just(10**9),
)
def test_any_conversation(texts: list[str], image: bool, name: str, max_length: int) -> None:
    template = TEMPLATES[name]
    if image:
        texts = [f"{IMAGE_PLACEHOLDER}\n{texts[0]}", *texts[1:]]
    turns = [Turn("assistant" if place % 2 else "user", text) for place, text in enumerate(texts)]
    try:
        made = encode(turns, template, TOKENIZER, max_length=max_length, **OPTIONS)
    except DataError as error:
        assert str(error).startswith("train.json, record 1")
        return
    ids, labels = made.input_ids, made.labels
    assert len(ids) == len(labels) <= max_length
    assert made.num_supervised > 0
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
    has_image = any(IMAGE_PLACEHOLDER in text for text in texts)
    assert ids.count(IMAGE_ID) == (4 if has_image else 0)
    assert IMAGE_ID not in labels
    assert ids.count(BOS_ID) == 1
    if not made.is_cut:
        answers = len(texts) // 2
        assert ids.count(EOS_ID) == (answers if template.end is None else 0)
        assert ids.count(IM_START_ID) == (len(texts) if name == "chatml" else 0)
        assert ids.count(IM_END_ID) == (len(texts) if name == "chatml" else 0)
        prompt = encode_prompt(turns[:-1], template, TOKENIZER, **OPTIONS)
        assert ids[: len(prompt.input_ids)] == prompt.input_ids
