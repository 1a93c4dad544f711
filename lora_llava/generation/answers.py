"""Generate a model's answers to the last questions of records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from lora_llava.conversation import endings
from lora_llava.conversation.chat_template import OwnTemplate, encode_own
from lora_llava.conversation.encode import Encoded, Turn, encode_prompt
from lora_llava.conversation.templates import Template
from lora_llava.data.images.read import mean_color, open_image, preprocess
from lora_llava.data.record import ImageSource, Record
from lora_llava.generation.decoding import Progress, greedy_decode
from lora_llava.generation.prompts import Prompt
from lora_llava.modeling.base import LoadedModel
from lora_llava.recipe.stages import AspectRatio

_BLIND = "the mean color"
"""Key of the image that replaces all images."""


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """How a model is asked: as it was trained."""

    template: Template | OwnTemplate
    aspect_ratio: AspectRatio
    """How images are made square."""
    blind: bool = False
    """Whether to replace every image by its mean color: what is still correct then was guessed from the question."""


def generate_answers(
    loaded: LoadedModel,
    records: Sequence[Record],
    form: PromptFormat,
    *,
    max_new_tokens: int,
    max_rows: int = 64,
    progress: Progress | None = None,
    on_cut: Callable[[int], object] | None = None,
) -> list[str]:
    """Answer the last question of each record greedily, given the earlier turns but not its own answer.

    `max_rows` bounds the questions in a forward pass; `greedy_decode` says what a row costs. `on_cut` is called with
    the index of each answer that `max_new_tokens` cut short. Raises DataError for an unusable record or image.
    """
    ends = end_token_ids(loaded, form.template)
    answers = greedy_decode(
        loaded.model,
        prompts_of(loaded, records, form, max_rows),
        eos_token_ids=ends,
        max_new_tokens=max_new_tokens,
        max_rows=max_rows,
        progress=progress,
    )
    if on_cut is not None:
        for index, answer in enumerate(answers):
            if not answer or answer[-1] not in ends:
                on_cut(index)
    return [answer_text(loaded.tokenizer, answer, ends) for answer in answers]


def prompts_of(
    loaded: LoadedModel, records: Sequence[Record], form: PromptFormat, max_images: int = 64
) -> list[Prompt]:
    """Encode the last question of each record; images are opened when they are needed, and `max_images` held.

    Raises DataError for an unusable record.
    """

    # The questions of one image may span two batches; the second finds the image here.
    @lru_cache(maxsize=max_images)
    def pixels(source: ImageSource | None) -> torch.Tensor:
        return image_tensor(loaded, source, form.aspect_ratio)

    return [last_question(loaded, record, form.template, pixels, form.blind) for record in records]


def end_token_ids(loaded: LoadedModel, template: Template | OwnTemplate) -> frozenset[int]:
    """Return the tokens that end an answer: those of generation_config.json, and that of the template."""
    own = getattr(loaded.model, "generation_config", None)
    named = getattr(own, "eos_token_id", None)
    ends = [] if named is None else named if isinstance(named, list) else [named]
    return frozenset(endings.end_token_ids(template, loaded.tokenizer, ends))


def _encode_question(
    loaded: LoadedModel, turns: Sequence[Turn], template: Template | OwnTemplate, record: Record
) -> Encoded:
    """Encode turns of a record that end with the user's, with a template of the kit or the model's own."""
    tokenizer, tokens = loaded.tokenizer, loaded.image_tokens
    if isinstance(template, OwnTemplate):
        return encode_own(turns, template, tokenizer, tokens, where=record.where, system=record.system)
    return encode_prompt(turns, template, tokenizer, tokens, where=record.where, system=record.system)


def image_tensor(loaded: LoadedModel, source: ImageSource | None, aspect_ratio: AspectRatio) -> torch.Tensor:
    """Open and preprocess an image to (3, size, size); None means an image of the mean color. Raises DataError."""
    image = mean_color(loaded.image_size, loaded.image_mean) if source is None else open_image(source)
    tensor: torch.Tensor = preprocess(
        image, size=loaded.image_size, mean=loaded.image_mean, std=loaded.image_std, aspect_ratio=aspect_ratio
    )
    return tensor


def last_question(
    loaded: LoadedModel,
    record: Record,
    template: Template | OwnTemplate,
    pixels: Callable[[ImageSource | None], torch.Tensor],
    blind: bool = False,
) -> Prompt:
    """Encode the turns of a record up to its last question."""
    turns = record.turns[:-1] if record.turns and record.turns[-1].role == "assistant" else record.turns
    encoded = _encode_question(loaded, turns, template, record)
    if record.image is None:
        return Prompt(encoded.input_ids, 0, None, None)
    source = None if blind else record.image
    key = _BLIND if blind else record.image.identity
    return Prompt(encoded.input_ids, encoded.prefix_length, partial(pixels, source), key)


def answer_text(tokenizer: Any, answer: list[int], ends: frozenset[int]) -> str:
    """Decode an answer without its end token, which may be an ordinary one (plain: a line feed)."""
    if answer and answer[-1] in ends:
        answer = answer[:-1]
    text: str = tokenizer.decode(answer, skip_special_tokens=True)
    return text.strip()
