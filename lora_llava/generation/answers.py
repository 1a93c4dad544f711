"""Answers of a model to the last questions of records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Protocol

import torch

from lora_llava.conversation import endings
from lora_llava.conversation.chat_template import OwnTemplate, encode_own
from lora_llava.conversation.encode import Encoded, Turn, encode_prompt
from lora_llava.conversation.templates import Template
from lora_llava.data.images.read import mean_colour, open_image, preprocess
from lora_llava.data.load import ImageSource, Record
from lora_llava.generation.decoding import Progress, Prompt, greedy_decode
from lora_llava.recipe.stages import AspectRatio

_BLIND = "the mean colour"


class GenerationModel(Protocol):
    """What is needed of a loaded model; `LoadedModel` has it."""

    @property
    def model(self) -> Any:
        """`LlavaForConditionalGeneration`, or a `PeftModel` around one."""

    @property
    def tokenizer(self) -> Any:
        """Its fast tokenizer."""

    @property
    def image_size(self) -> int:
        """Side of the square that the vision tower sees, in pixels."""

    @property
    def image_mean(self) -> tuple[float, ...]:
        """Mean of each channel."""

    @property
    def image_std(self) -> tuple[float, ...]:
        """Standard deviation of each channel."""

    @property
    def num_image_tokens(self) -> int:
        """Placeholder tokens that stand for one image."""

    @property
    def image_token_id(self) -> int:
        """Id of `<image>`."""


def generate_answers(
    loaded: GenerationModel,
    records: Sequence[Record],
    *,
    template: Template | OwnTemplate,
    aspect_ratio: AspectRatio,
    max_new_tokens: int,
    max_rows: int = 64,
    blind: bool = False,
    progress: Progress | None = None,
    on_cut: Callable[[int], object] | None = None,
) -> list[str]:
    """Answer the last question of each record greedily; its own answer is not shown, earlier turns are.

    `max_rows` bounds the questions in a forward pass (see `greedy_decode` for what a row costs). `blind` puts
    the mean colour in place of every image: what is still right then was known without looking. `on_cut` is called
    with the index of each answer that `max_new_tokens` cut short. Raises DataError for a record or image that cannot
    be used.
    """

    # An image whose questions do not fit in one batch is still in here when the next batch asks for it.
    @lru_cache(maxsize=max_rows)
    def pixels(source: ImageSource | None) -> torch.Tensor:
        return image_tensor(loaded, source, aspect_ratio)

    ends = end_token_ids(loaded, template)
    answers = greedy_decode(
        loaded.model,
        [last_question(loaded, record, template, pixels, blind) for record in records],
        eos_token_ids=ends,
        # Any id will do: padding is masked. Llama's tokenizers have no pad token of their own.
        pad_token_id=min(ends, default=0),
        max_new_tokens=max_new_tokens,
        max_rows=max_rows,
        progress=progress,
    )
    if on_cut is not None:
        for index, answer in enumerate(answers):
            if not answer or answer[-1] not in ends:
                on_cut(index)
    return [answer_text(loaded.tokenizer, answer, ends) for answer in answers]


def end_token_ids(loaded: GenerationModel, template: Template | OwnTemplate) -> frozenset[int]:
    """Return the tokens that end an answer: those of the model's generation_config.json, and the taught one."""
    own = getattr(loaded.model, "generation_config", None)
    named = getattr(own, "eos_token_id", None)
    ends = [] if named is None else named if isinstance(named, list) else [named]
    return frozenset(endings.end_token_ids(template, loaded.tokenizer, ends))


def encode_turns(
    loaded: GenerationModel, turns: Sequence[Turn], template: Template | OwnTemplate, where: str
) -> Encoded:
    """Encode turns that end with the user's, in a template of the kit or in the model's own."""
    sizes: dict[str, Any] = {"image_token_id": loaded.image_token_id, "num_image_tokens": loaded.num_image_tokens}
    if isinstance(template, OwnTemplate):
        return encode_own(turns, template, loaded.tokenizer, where=where, **sizes)
    return encode_prompt(turns, template, loaded.tokenizer, where=where, **sizes)


def image_tensor(loaded: GenerationModel, source: ImageSource | None, aspect_ratio: AspectRatio) -> torch.Tensor:
    """Open and preprocess an image, (3, size, size); None is the mean color. Raises DataError."""
    image = mean_colour(loaded.image_size, loaded.image_mean) if source is None else open_image(source)
    tensor: torch.Tensor = preprocess(
        image, size=loaded.image_size, mean=loaded.image_mean, std=loaded.image_std, aspect_ratio=aspect_ratio
    )
    return tensor


def last_question(
    loaded: GenerationModel,
    record: Record,
    template: Template | OwnTemplate,
    pixels: Callable[[ImageSource | None], torch.Tensor],
    blind: bool = False,
) -> Prompt:
    """Encode the turns before a record's last answer."""
    turns = record.turns[:-1] if record.turns and record.turns[-1].role == "assistant" else record.turns
    encoded = encode_turns(loaded, turns, template, record.where)
    if record.image is None:
        return Prompt(encoded.input_ids, 0, None, None)
    source = None if blind else record.image
    key = _BLIND if blind else record.image.key
    return Prompt(encoded.input_ids, encoded.prefix_length, partial(pixels, source), key)


def answer_text(tokenizer: Any, answer: list[int], ends: frozenset[int]) -> str:
    """Decode an answer without its end token, which need not be a special one (plain: a line feed)."""
    if answer and answer[-1] in ends:
        answer = answer[:-1]
    text: str = tokenizer.decode(answer, skip_special_tokens=True)
    return text.strip()
