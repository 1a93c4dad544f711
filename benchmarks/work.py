"""Make the work of every trainer from a seed: the same token ids, targets and images.

Sets, as in visual instruction data: S1, captions (stage 1); V1, V4, V8, V11, that number of questions per image; MX,
mixed lengths, with conversations of several turns and of text alone.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass

import torch

from lora_llava.conversation.encode import IGNORE_INDEX, Encoded
from lora_llava.recipe.stages import StageName

IMAGE_ID = 3
FIRST_WORD = 10
PROMPT_TOKENS = 24
"""Tokens before an image: BOS, system prompt, `USER: `; the same in every conversation."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """Sizes of a LLaVA with random weights."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    vision_hidden_size: int
    vision_layers: int
    image_size: int = 336
    patch_size: int = 14
    rank: int = 16

    @property
    def image_tokens(self) -> int:
        """Tokens of one image."""
        return (self.image_size // self.patch_size) ** 2


SHAPES = {
    "tiny": Shapes(64, 176, 2, 2, 64, 32, 2, image_size=56, rank=4),
    "small": Shapes(512, 1408, 8, 8, 4096, 64, 2),
    "7b": Shapes(4096, 11008, 32, 32, 32064, 1024, 24, rank=128),
    "13b": Shapes(5120, 13824, 40, 40, 32064, 1024, 24, rank=64),
}
"""`small` is for a CPU: the image tokens of the real model, and a vocabulary small enough not to outweigh the layers.
`7b` and `13b` are LLaVA-1.5's; `tiny` only tries the benchmark itself."""


@dataclass(frozen=True, slots=True)
class Work:
    """The conversations of one optimizer step."""

    name: str
    stage: StageName
    conversations: list[Encoded]
    images: list[int | None]
    """Number of the image that each conversation is about."""

    @property
    def supervised(self) -> int:
        """Targets of the loss."""
        return sum(sample.num_supervised for sample in self.conversations)

    @property
    def sha256(self) -> str:
        """Hash of ids, targets and images."""
        rows = [
            [sample.input_ids, sample.labels, image]
            for sample, image in zip(self.conversations, self.images, strict=True)
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def pixels(image: int, shapes: Shapes) -> torch.Tensor:
    """Return the pixels (3, H, W) of an image."""
    return torch.randn(3, shapes.image_size, shapes.image_size, generator=torch.Generator().manual_seed(1000 + image))


def make_work(name: str, shapes: Shapes, questions: int) -> Work:
    """Make one step of `questions` conversations of the set `name`."""
    rng = random.Random(f"{name}/{questions}")
    prompt = [1, *_words(random.Random(0), PROMPT_TOKENS - 1, shapes)]
    conversations, images = [], []
    for number in range(questions):
        image: int | None = number if name in ("S1", "MX") else number // int(name[1:])
        if name == "S1":
            sample = _conversation([], shapes, [(0, rng.randint(10, 24))], rng, image=True)
        elif name == "MX":
            sample, image = _mixed(number, prompt, shapes, rng)
        else:
            sample = _conversation(prompt, shapes, [(rng.randint(25, 45), rng.randint(3, 10))], rng, image=True)
        conversations.append(sample)
        images.append(image)
    return Work(name, "align" if name == "S1" else "instruct", conversations, images)


def _mixed(number: int, prompt: list[int], shapes: Shapes, rng: random.Random) -> tuple[Encoded, int | None]:
    """Every fourth of text alone, every fourth of several turns; two and two questions share an image."""
    kind = number % 4
    if kind == 3:
        turns = [(rng.randint(20, 120), rng.randint(60, 400)) for _ in range(rng.randint(1, 2))]
        return _conversation(prompt, shapes, turns, rng, image=False), None
    turns = [(rng.randint(15, 40), rng.randint(3, 60)) for _ in range(rng.randint(3, 5) if kind == 2 else 1)]
    return _conversation(prompt, shapes, turns, rng, image=True), number // 4 * 2 + kind // 2


def _words(rng: random.Random, count: int, shapes: Shapes) -> list[int]:
    return [rng.randrange(FIRST_WORD, shapes.vocab_size) for _ in range(count)]


def _conversation(
    prompt: list[int], shapes: Shapes, turns: list[tuple[int, int]], rng: random.Random, *, image: bool
) -> Encoded:
    """Lay out turns, given by their numbers of question and answer tokens."""
    ids = [*prompt] or [1]
    ids += [IMAGE_ID] * shapes.image_tokens if image else []
    prefix = len(ids) if image else 0
    labels = [IGNORE_INDEX] * len(ids)
    for question, answer in turns:
        asked, told = _words(rng, question, shapes), _words(rng, answer, shapes)
        ids += asked + told
        labels += [IGNORE_INDEX] * question + told
    return Encoded(ids, labels, prefix)
