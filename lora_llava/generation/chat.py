"""Chat with a trained model, about one image or none; answers are streamed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lora_llava.artifact import Usage, load_model, template_to_ask
from lora_llava.conversation.encode import IMAGE_PLACEHOLDER, Turn
from lora_llava.data.images.read import open_image
from lora_llava.data.record import ImageSource, Record, check_text
from lora_llava.errors import DataError
from lora_llava.generation.answers import answer_text, end_token_ids, image_tensor, last_question
from lora_llava.generation.decoding import CachedConversation
from lora_llava.modeling.base import LoadedModel

Say = Callable[[str], None]
"""Receives the next piece of an answer."""


class Chat:
    """Prompts a model with the template and image transform of its training, and remembers the turns."""

    def __init__(self, loaded: LoadedModel, usage: Usage, image: ImageSource | None, max_new_tokens: int) -> None:
        self.loaded = loaded
        self.template = template_to_ask(usage, loaded.directory)
        self.image = image and replace(image, window=usage.window)
        self.max_new_tokens = max_new_tokens
        self.turns: tuple[Turn, ...] = ()
        self._ends = end_token_ids(loaded, self.template)
        self._conversation = CachedConversation(loaded.model, loaded.image_tokens.id)

        @lru_cache(maxsize=1)
        def pixels(source: ImageSource | None) -> torch.Tensor:
            return image_tensor(loaded, source, usage.image_aspect_ratio)

        self._pixels = pixels

    @classmethod
    def open(
        cls,
        model: Path | str,
        image: Path | str | None = None,
        *,
        base: str | None = None,
        template: str | None = None,
        max_new_tokens: int = 256,
    ) -> Chat:
        """Load an artifact or a merged model to chat with, about the image in the file `image` or without one.

        `base`: directory or hub id of the base, if it is not where the artifact says; `template`: for a model that
        does not say its own. Raises LoraLlavaError's subclasses for a model or an image that cannot be used.
        """
        source = None if image is None else ImageSource(str(image), Path(image), None)
        if source is not None:
            open_image(source)
        return cls(*load_model(model, base=base, template=template), source, max_new_tokens)

    def ask(self, question: str, say: Say | None = None) -> str:
        """Answer `question` greedily, given the earlier turns; DataError if it cannot be asked.

        `say` receives the answer piece by piece while it is generated.
        """
        if IMAGE_PLACEHOLDER in question:
            raise DataError(f"a question must not hold {IMAGE_PLACEHOLDER}; the image is put in front of the first")
        check_text(question, "question")
        begins = self.image is not None and not self.turns
        turn = Turn("user", f"{IMAGE_PLACEHOLDER}\n{question}" if begins else question)
        record = Record("chat", self.image, (*self.turns, turn), f"question {len(self.turns) // 2 + 1}")
        writer = AnswerWriter(self.loaded.tokenizer, self._ends, say)
        answer = writer.finish(
            self._conversation.answer(
                last_question(self.loaded, record, self.template, self._pixels),
                eos_token_ids=self._ends,
                max_new_tokens=self.max_new_tokens,
                on_token=None if say is None else writer.add,
            )
        )
        # A conversation cannot contain an empty answer: forget the question.
        if answer:
            self.turns = (*self.turns, turn, Turn("assistant", answer))
        return answer


class AnswerWriter:
    """Streams tokens as text: whole characters only, without the space around the answer."""

    def __init__(self, tokenizer: Any, ends: frozenset[int], say: Say | None) -> None:
        self.tokenizer = tokenizer
        self.ends = ends
        self.say = say
        self._tokens: list[int] = []
        self._said = ""

    def add(self, token: int) -> None:
        """Add the next token, and pass on the text that it completes."""
        self._tokens.append(token)
        text = answer_text(self.tokenizer, self._tokens, self.ends)
        # Part of a character, which the next token completes.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._hand_over(text)

    def finish(self, answer: list[int]) -> str:
        """Pass on the rest, and return the whole answer."""
        text = answer_text(self.tokenizer, answer, self.ends)
        self._hand_over(text)
        return text

    def _hand_over(self, text: str) -> None:
        if self.say is not None and text.startswith(self._said) and text != self._said:
            self.say(text[len(self._said) :])
            self._said = text
