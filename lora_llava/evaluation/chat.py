"""A talk with a trained model about one image."""

from __future__ import annotations

from lora_llava.artifact import Usage
from lora_llava.conversation import IMAGE_PLACEHOLDER, Turn, get_template
from lora_llava.data.records import ImageSource, Record
from lora_llava.errors import DataError
from lora_llava.evaluation.generation import generate_answers
from lora_llava.modeling.base import LoadedModel


class Chat:
    """Asks in the template and image form of the model's training, and remembers what was said."""

    def __init__(self, loaded: LoadedModel, usage: Usage, image: ImageSource, max_new_tokens: int) -> None:
        self.loaded = loaded
        self.template = get_template(**usage.template)
        self.aspect_ratio = usage.image_aspect_ratio
        self.image = image
        self.max_new_tokens = max_new_tokens
        self.turns: tuple[Turn, ...] = ()

    def ask(self, question: str) -> str:
        """Answer `question` greedily, in the light of the turns before; DataError if it cannot be asked."""
        if IMAGE_PLACEHOLDER in question:
            raise DataError(f"a question must not hold {IMAGE_PLACEHOLDER}; the image is put in front of the first")
        turn = Turn("user", question if self.turns else f"{IMAGE_PLACEHOLDER}\n{question}")
        record = Record("chat", self.image, (*self.turns, turn), f"question {len(self.turns) // 2 + 1}")
        [answer] = generate_answers(
            self.loaded,
            [record],
            template=self.template,
            aspect_ratio=self.aspect_ratio,
            max_new_tokens=self.max_new_tokens,
        )
        # An answer with nothing in it cannot stand in a conversation: as if it had not been asked.
        if answer:
            self.turns = (*self.turns, turn, Turn("assistant", answer))
        return answer
