"""Answers to a few validation questions, logged with each validation, so that a person sees what the model says."""

from __future__ import annotations

from collections.abc import Sequence

from lora_llava.conversation.templates import Template
from lora_llava.data.record import Record
from lora_llava.generation.answers import PromptFormat, generate_answers
from lora_llava.modeling.attention import with_sdpa
from lora_llava.modeling.base import LoadedModel
from lora_llava.modeling.packed import llava_in
from lora_llava.recipe.stages import AspectRatio
from lora_llava.system.ranks import by_first
from lora_llava.training.checks.check import Check, ValidationPass
from lora_llava.training.parallel.lockstep import is_in_lockstep

_SAMPLE_TOKENS = 32
"""Maximum length of a sample answer, in tokens."""


class SampleAnswers(Check):
    """Answers the questions of `records` at each validation, with the weights of that step."""

    def __init__(
        self, loaded: LoadedModel, records: Sequence[Record], template: Template, aspect_ratio: AspectRatio
    ) -> None:
        self.loaded = loaded
        self.records = records
        self.template = template
        self.aspect_ratio = aspect_ratio

    def on_validation(self, validation: ValidationPass) -> None:
        """Add `samples`: the question, the true answer and the prediction of each record.

        Not of a sharded model, which would need all processes for each token.
        """
        if is_in_lockstep():
            return
        validation.metrics["samples"] = [
            {"question": record.question, "answer": record.turns[-1].text, "prediction": answer}
            for record, answer in zip(self.records, by_first(self._generate), strict=True)
        ]

    def _generate(self) -> list[str]:
        with with_sdpa(llava_in(self.loaded.model)):
            return generate_answers(
                self.loaded,
                self.records,
                PromptFormat(self.template, self.aspect_ratio),
                max_new_tokens=_SAMPLE_TOKENS,
            )
