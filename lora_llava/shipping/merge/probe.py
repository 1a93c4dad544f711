"""The same questions to two models: how far their logits are apart, and whether they answer the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoTokenizer, LlavaConfig

from lora_llava.artifact import Manifest
from lora_llava.conversation.encode import IMAGE_PLACEHOLDER, Turn, encode_prompt, get_template
from lora_llava.formats.names import EMBEDDINGS, HEAD, canonical_name, split_lora, unwrap_peft
from lora_llava.formats.peft_adapter import Adapter
from lora_llava.generation.answers import end_token_ids
from lora_llava.generation.decoding import Prompt, greedy_decode
from lora_llava.modeling.base import BaseIdentity, LoadedModel
from lora_llava.modeling.streamed import empty_llava, stream_weights
from lora_llava.shipping.merge.stream import Read

ANSWER_TOKENS = 8
"""Longest probe answer; each token is a pass over all weights."""
_IMAGE_QUESTIONS = ("What is in the image?", "Is it red? Answer yes or no.")
"""Each about an image of its own."""
_TEXT_QUESTIONS = ("What is the capital of France?", "Name a colour.")
# Four rows: in fp32, keys and values of a 7B model take 1 MB a token, and an image has 576.
_POSITIONS = 16
"""Positions at the end of each sequence, the answer's included, whose logits are compared."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a model is from the one it should be."""

    max_abs: float
    """Largest difference of a logit."""
    relative: float
    """Length of the differences over the length of the logits (L2, all compared positions together)."""
    answers_equal: int
    answers: int

    def plain(self) -> dict[str, Any]:
        """The figures as JSON has them."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"largest {self.max_abs:.2g}, relative {self.relative:.2g}; "
            f"{self.answers_equal} of {self.answers} greedy answers the same"
        )


@dataclass(frozen=True, slots=True)
class Sequences:
    """Probe questions with one model's greedy answers."""

    prompts: list[Prompt]
    answers: list[list[int]]


def merged_model(read: Read, config: LlavaConfig) -> Any:
    """Build a plain model over `read`, computing in fp32."""
    model = empty_llava(config)
    stream_weights(model, lambda name, _: read(_stored(canonical_name(name), config)))
    return model


def adapted_model(read: Read, config: LlavaConfig, adapter: Adapter) -> Any:
    """Build PEFT's own model of base and adapter over `read`, computing in fp32."""
    form = copy.deepcopy(adapter.config)
    form.base_model_name_or_path = None
    model = get_peft_model(empty_llava(config), form, low_cpu_mem_usage=True).eval()

    def parameter(name: str, _: torch.Tensor) -> torch.Tensor:
        unwrapped = unwrap_peft(name)
        if lora := split_lora(unwrapped):
            weight, part = lora
            keys = adapter.layers[canonical_name(weight)]
            key = {"lora_A": keys.a, "lora_B": keys.b, "lora_magnitude_vector": keys.magnitude}[part]
            assert key is not None
            return adapter.read(key)
        canonical = canonical_name(unwrapped.replace(".base_layer.", "."))
        if ".modules_to_save." in name:
            return adapter.read(adapter.replaced[canonical])
        return read(_stored(canonical, config))

    stream_weights(model, parameter)
    return model


def _stored(name: str, config: LlavaConfig) -> str:
    return EMBEDDINGS if name == HEAD and config.tie_word_embeddings else name


def ask(model: nn.Module, config: LlavaConfig, manifest: Manifest, tokenizer_directory: Path) -> Sequences:
    """Put the probe questions in the template of the artifact's training, and let `model` answer greedily."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    template = get_template(**manifest.template)
    loaded = LoadedModel(model, tokenizer, tokenizer_directory, BaseIdentity("", None, ""), (), (), config)
    texts = () if template.caption_only else _TEXT_QUESTIONS
    prompts = []
    for place, text in [*enumerate(_IMAGE_QUESTIONS), *((None, one) for one in texts)]:
        words = text if place is None else f"{IMAGE_PLACEHOLDER}\n{text}"
        encoded = encode_prompt(
            [Turn("user", words)],
            template,
            tokenizer,
            image_token_id=loaded.image_token_id,
            num_image_tokens=loaded.num_image_tokens,
            where="probe",
        )
        pixels = None if place is None else _picture(place, loaded.image_size)
        # Nothing is shared on purpose: one batch, so that each token of the answers is one pass over the weights.
        prompts.append(Prompt(encoded.input_ids, 0, pixels, place))
    ends = end_token_ids(loaded, template)
    answers = greedy_decode(
        model,
        prompts,
        # An image token in an answer, which a poorly trained model may give, would ask for an image.
        eos_token_ids=ends | {loaded.image_token_id},
        pad_token_id=min(ends, default=0),
        max_new_tokens=ANSWER_TOKENS,
    )
    return Sequences(prompts, answers)


def _picture(number: int, size: int) -> torch.Tensor:
    """Make coloured clouds, (3, size, size), of unit spread as normalised pixels are."""
    coarse = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(number))
    return nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)[0]


@torch.no_grad()
def logits_of(model: nn.Module, asked: Sequences) -> list[torch.Tensor]:
    """Return for each sequence the logits at its last positions, each (at most `_POSITIONS`, vocabulary).

    The answers are given, so that the models are compared on the same text.
    """
    rows = [[*prompt.input_ids, *answer[:-1]] for prompt, answer in zip(asked.prompts, asked.answers, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    images = [prompt.pixels() for prompt in asked.prompts if prompt.pixel_values is not None]
    output: Any = model(
        input_ids=ids,
        pixel_values=torch.stack(images),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        logits_to_keep=min(_POSITIONS, width),
        use_cache=False,
    )
    return [logits[-min(len(row), _POSITIONS) :] for row, logits in zip(rows, output.logits, strict=True)]


def difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], asked: Sequences) -> Difference:
    """Compare a model's logits with those of the model it should be.

    Greedy answers are the same if, along the asked model's answer, the other's first choice is always its next token.
    """
    mine, others = torch.cat(list(ours)), torch.cat(list(theirs))
    apart = (mine - others).double()
    same = sum(
        logits[-len(answer) :].argmax(-1).tolist() == answer
        for logits, answer in zip(theirs, asked.answers, strict=True)
    )
    return Difference(
        max_abs=float(apart.abs().max()),
        relative=float(apart.norm() / others.double().norm()),
        answers_equal=same,
        answers=len(asked.answers),
    )
