"""Preference pairs small enough for a test, and their loss by definition: padded, one answer a sequence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn import functional as F

from lora_llava.conversation.encode import IGNORE_INDEX, Encoded, ImageTokens, Turn
from lora_llava.conversation.templates import get_template
from lora_llava.data.pairs import encode_pair
from lora_llava.data.record import Record
from lora_llava.data.rows import Batch, build_row
from lora_llava.modeling.attention import with_sdpa
from lora_llava.modeling.packed import llava_in
from lora_llava.recipe.stages import PreferSettings
from tests.helpers.runs import COLORS, NUM_IMAGES, picture, write_data, write_recipe
from tests.helpers.tiny import IMAGE_ID, NUM_IMAGE_TOKENS, PAD_ID, tiny_tokenizer
from tests.parity.test_packed import image

TEXTS = (
    ("<image>\nWhat is it?", "It is a dog on a chair.", "It is a dog on a table, and a cat."),
    ("<image>\nIs there a dog?", "no", "yes, there is a dog"),
    ("Is water wet?", "yes", "no, it is not"),
    ("<image>\nWhat is the weather?", "The sky cannot be seen.", "rain"),
)
"""Question, chosen and rejected answer: with a common beginning, without one, without an image."""


def pair_record(*texts: str, where: str = "pairs.json, record 1") -> Record:
    """A record of the turns in `texts`, whose last one is the rejected answer."""
    turns = [Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts[:-1])]
    return Record("1", None, tuple(turns), where, rejected=texts[-1])


def pair(*texts: str, max_length: int = 400) -> Encoded:
    """Encode a pair."""
    return encode_pair(
        pair_record(*texts),
        template=get_template("vicuna_v1"),
        tokenizer=tiny_tokenizer(),
        image_tokens=ImageTokens(IMAGE_ID, NUM_IMAGE_TOKENS),
        max_length=max_length,
    )


def prefer_settings(**settings: Any) -> PreferSettings:
    """Settings of stage `prefer`."""
    return PreferSettings.model_validate({"data": {"path": "pairs.json"}, **settings})


def has_image(encoded: Encoded) -> bool:
    """Tell whether a pair is about an image."""
    return IMAGE_ID in encoded.input_ids


def row_of_pairs(
    pairs: Sequence[Encoded], reference: torch.Tensor, start: int = 0, dtype: torch.dtype = torch.float32
) -> Batch:
    """Pack pairs in one row; image `start` + k belongs to pair k, `reference` (P, 2)."""
    batch = build_row([[one] for one in pairs])
    images = [image(start + number, dtype) for number, one in enumerate(pairs) if has_image(one)]
    if images:
        batch["pixel_values"] = torch.stack(images)
    return {**batch, "reference": reference}


def padded(pairs: Sequence[Encoded], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Lay both answers of all pairs out as padded sequences (2 P, T): all chosen ones, then all rejected ones."""
    branches = [branch for side in zip(*(one.branches for one in pairs), strict=True) for branch in side]
    length = max(len(branch.input_ids) for branch in branches)

    def of(values: Sequence[int], fill: int) -> list[int]:
        return [*values, *[fill] * (length - len(values))]

    batch = {
        "input_ids": torch.tensor([of(branch.input_ids, PAD_ID) for branch in branches]),
        "attention_mask": torch.tensor([of([1] * len(branch.input_ids), 0) for branch in branches]),
        "labels": torch.tensor([of(branch.labels, IGNORE_INDEX) for branch in branches]),
    }
    images = [image(number, dtype) for number, one in enumerate(pairs) if has_image(one)]
    return batch | ({"pixel_values": torch.stack(images * 2)} if images else {})


def log_probs_by_definition(model: Any, pairs: Sequence[Encoded]) -> torch.Tensor:
    """Log-probabilities (P, 2) of the answers by the model's own forward pass over padded sequences."""
    batch = padded(pairs)
    labels = batch.pop("labels")[:, 1:]
    with with_sdpa(llava_in(model)):
        logits = model(**batch).logits[:, :-1].float()
    known = labels.clamp(min=0)[..., None]
    per_token = logits.log_softmax(-1).gather(-1, known)[..., 0] * (labels != IGNORE_INDEX)
    return per_token.double().sum(1).view(2, -1).T


def loss_by_definition(
    settings: PreferSettings, log_probs: torch.Tensor, reference: torch.Tensor, pairs: Sequence[Encoded]
) -> torch.Tensor:
    """The mean loss over pairs, written as in the papers."""
    lengths = torch.tensor([[branch.num_supervised for branch in one.branches] for one in pairs])
    total = torch.zeros((), dtype=torch.float64)
    for (chosen, rejected), (chosen_0, rejected_0), (num_chosen, num_rejected) in zip(
        log_probs, reference, lengths, strict=True
    ):
        logit = (chosen - rejected) - (chosen_0 - rejected_0)
        if settings.loss == "sigmoid":
            swapped = settings.label_smoothing
            one = -(1 - swapped) * torch.log(torch.sigmoid(settings.beta * logit))
            one = one - swapped * torch.log(1 - torch.sigmoid(settings.beta * logit))
        elif settings.loss == "hinge":
            one = F.relu(1 - settings.beta * logit)
        else:
            per_token = (chosen - chosen_0) / num_chosen - (rejected - rejected_0) / num_rejected
            one = (per_token - 0.5 / settings.beta) ** 2
        total = total + one - settings.sft_weight * chosen / num_chosen
    return total / len(pairs)


def write_pairs(directory: Path) -> None:
    """Write pairs about the images of `write_data`, and two without an image."""
    colors = list(COLORS)
    records: list[dict[str, Any]] = []
    for number in range(NUM_IMAGES):
        color, wrong = picture(number)[0], colors[(number + 1) % len(colors)]
        records += [
            entry("What is the colour?", color, wrong, f"{number}.png"),
            entry("What is it?", f"a thing that is {color}", f"a thing that is {wrong}, and a dog", f"{number}.png"),
        ]
    records += [entry("Is water wet?", "yes", "no"), entry("Who is it?", "no one knows", "it is the king")]
    (directory / "pairs.json").write_text(json.dumps(records), encoding="utf-8")


def entry(question: str, chosen: str, rejected: str, image_name: str | None = None) -> dict[str, Any]:
    """A pair in LLaVA's form."""
    text = question if image_name is None else f"<image>\n{question}"
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": chosen}]
    return {"conversations": turns, "rejected": rejected, **({"image": image_name} if image_name else {})}


def write_preference_project(directory: Path, base: Path, *stages: str) -> Path:
    """Write data, pairs and a recipe of `stages` and then `prefer`; return the recipe's path."""
    write_data(directory)
    write_pairs(directory)
    path = write_recipe(directory, {"model_name_or_path": str(base)}, stages)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["stages"]["prefer"] = {
        "data": {"path": "pairs.json", "image_root": "images", "validation": {"share": 0.2}},
        "max_length": 200,
        "tokens_per_micro_batch": 250,
        "batch_size": 5,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "eval_steps": 2,
        "num_sample_answers": 1,
    }
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
