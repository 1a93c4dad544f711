"""Answers to records, against `generate` on each record alone."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image

import lora_llava.generation.answers as generation
from lora_llava.conversation.encode import ImageTokens, Turn, encode_prompt
from lora_llava.conversation.templates import get_template
from lora_llava.data.images.read import mean_color, open_image, preprocess
from lora_llava.data.record import ImageSource, Record
from lora_llava.generation.answers import PromptFormat, end_token_ids, generate_answers
from tests.helpers.tiny import (
    EOS_ID,
    IM_END_ID,
    IMAGE_ID,
    IMAGE_SIZE,
    NUM_IMAGE_TOKENS,
    PAD_ID,
    tiny_llava,
    tiny_tokenizer,
)

MAX_NEW_TOKENS = 10
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@dataclass
class Loaded:
    model: Any
    tokenizer: Any
    image_size: int = IMAGE_SIZE
    image_mean: tuple[float, ...] = MEAN
    image_std: tuple[float, ...] = STD
    image_tokens: ImageTokens = ImageTokens(IMAGE_ID, NUM_IMAGE_TOKENS)  # noqa: RUF009 - immutable


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Loaded(tiny_llava(seed=5), tiny_tokenizer())


def source(name: str, size: tuple[int, int], color: tuple[int, int, int]) -> ImageSource:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format="PNG")
    return ImageSource(key=name, path=None, data=buffer.getvalue())


RED = source("red", (20, 30), (250, 0, 0))
BLUE = source("blue", (60, 30), (0, 0, 250))


def records() -> list[Record]:
    def record(image: ImageSource | None, *texts: str) -> Record:
        turns = tuple(Turn("assistant" if place % 2 else "user", text) for place, text in enumerate(texts))
        return Record(id=texts[0], image=image, turns=turns, where=f"test, {texts[0]}")

    return [
        record(RED, "<image>\nWhat is the colour?", "red"),
        record(BLUE, "<image>\nIs it red?", "no"),
        record(None, "What is it?", "nothing"),
        record(RED, "<image>\nWhat is it and where?", "a thing", "And why?", "no one knows"),
        record(BLUE, "Look at this.", "yes", "<image>\nWhat is it?", "blue"),
        record(RED, "<image>\nIs it?", "yes"),
    ]


def answer_alone(loaded: Loaded, record: Record, *, blind: bool) -> str:
    prompt = encode_prompt(
        record.turns[:-1],
        get_template("vicuna_v1"),
        loaded.tokenizer,
        image_tokens=ImageTokens(IMAGE_ID, NUM_IMAGE_TOKENS),
        where="",
    )
    ids = torch.tensor([prompt.input_ids])
    pixels = {}
    if record.image is not None:
        image = mean_color(IMAGE_SIZE, MEAN) if blind else open_image(record.image)
        tensor = preprocess(image, size=IMAGE_SIZE, mean=MEAN, std=STD, aspect_ratio="pad")
        pixels = {"pixel_values": tensor[None]}
    output = loaded.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        max_new_tokens=MAX_NEW_TOKENS,
        **pixels,
    )
    text: str = loaded.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return text.strip()


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("max_rows", [1, 64])
def test_equals_generate_on_each_record_alone(loaded: Loaded, blind: bool, max_rows: int) -> None:
    theirs = [answer_alone(loaded, record, blind=blind) for record in records()]
    ours = generate_answers(
        loaded,
        records(),
        PromptFormat(get_template("vicuna_v1"), "pad", blind=blind),
        max_new_tokens=MAX_NEW_TOKENS,
        max_rows=max_rows,
    )
    assert ours == theirs
    assert len(set(ours)) > 2


def test_the_records_own_answer_is_not_seen(loaded: Loaded) -> None:
    def answers(own: str) -> list[str]:
        asked = [Record(r.id, r.image, (*r.turns[:-1], Turn("assistant", own)), r.where) for r in records()]
        return generate_answers(
            loaded,
            asked,
            PromptFormat(get_template("vicuna_v1"), "pad"),
            max_new_tokens=MAX_NEW_TOKENS,
        )

    assert answers("this") == answers("something else")


@pytest.mark.parametrize(("blind", "opened", "seen"), [(False, ["red", "blue"], 3), (True, [], 2)])
def test_each_image_is_opened_once_and_computed_once(
    monkeypatch: pytest.MonkeyPatch, blind: bool, opened: list[str], seen: int
) -> None:
    names: list[str] = []

    def watch(image: ImageSource, original: Callable[[ImageSource], Image.Image] = open_image) -> Image.Image:
        names.append(image.key)
        return original(image)

    monkeypatch.setattr(generation, "open_image", watch)
    loaded = Loaded(tiny_llava(seed=5), tiny_tokenizer())
    images: list[int] = []
    loaded.model.model.vision_tower.register_forward_pre_hook(lambda _, args: images.append(len(args[0])))
    progress: list[tuple[int, int]] = []
    generate_answers(
        loaded,
        records(),
        PromptFormat(get_template("vicuna_v1"), "pad", blind=blind),
        max_new_tokens=2,
        progress=lambda done, total: progress.append((done, total)),
    )
    assert names == opened
    # Once for each image that begins a conversation, and once for the one that comes in a later turn.
    assert sum(images) == seen
    assert progress == [(4, 6), (6, 6)]


@pytest.mark.parametrize(("name", "end"), [("vicuna_v1", EOS_ID), ("chatml", IM_END_ID)])
def test_an_answer_ends_where_training_taught_it_to(loaded: Loaded, name: str, end: int) -> None:
    assert end_token_ids(loaded, get_template(name)) == {EOS_ID, end}


def test_plain_answers_end_with_a_line_feed(loaded: Loaded) -> None:
    (end,) = end_token_ids(loaded, get_template("plain")) - {EOS_ID}
    assert loaded.tokenizer.decode([end]) == "\n"
    (answer,) = generate_answers(
        loaded,
        records()[:1],
        PromptFormat(get_template("plain"), "pad"),
        max_new_tokens=MAX_NEW_TOKENS,
    )
    assert answer == answer.strip()


def test_no_records_no_answers(loaded: Loaded) -> None:
    template = get_template("vicuna_v1")
    assert generate_answers(loaded, [], PromptFormat(template, "pad"), max_new_tokens=1) == []
