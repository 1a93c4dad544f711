"""Ask the original LLaVA's code about an export: REPOSITORY MODEL QUESTIONS OUTPUT."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from PIL import Image

from tools.foreign.asked import read_questions, write_answers


@torch.no_grad()
def main(repository: str, directory: str, questions: str, output: str) -> None:
    """Load the model as the original's own `eval` does, and answer greedily."""
    sys.path.insert(0, repository)
    # The export's vision tower is named relative to it.
    os.chdir(directory)
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import process_images
    from llava.model.builder import load_pretrained_model

    tokenizer, model, processor, _ = load_pretrained_model(".", None, "llava", device="cpu", device_map="cpu")
    model = model.float().eval()
    model.get_vision_tower().float()
    _compute_rotary(model)
    answers, logits = [], []
    for entry in read_questions(questions):
        with Image.open(entry["image"]) as image:
            pixels = process_images([image.convert("RGB")], processor, model.config).float()
        ids = torch.tensor([_prompt_ids(entry["prompt"], tokenizer, IMAGE_TOKEN_INDEX)])
        logits.append(model(ids, images=pixels).logits[0, -1].numpy())
        tokens = model.generate(ids, images=pixels, do_sample=False, max_new_tokens=entry["max_new_tokens"])
        answers.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
    write_answers(output, answers, logits)


def _prompt_ids(prompt: str, tokenizer: Any, image: int) -> list[int]:
    """Encode a prompt as the original's `tokenizer_image_token` does for a tokenizer that adds a BOS.

    That function takes any first token that equals the BOS for an added one, as in ChatML, and then drops the token
    after the image.
    """
    before, after = (tokenizer(part).input_ids for part in prompt.split("<image>"))
    added = len(tokenizer("").input_ids)
    return [*before, image, *after[added:]]


def _compute_rotary(model: Any) -> None:
    """Compute the rotary tables again: they were loaded in fp16."""
    for module in model.modules():
        if hasattr(module, "_set_cos_sin_cache"):
            module.inv_freq = 1.0 / module.base ** (torch.arange(0, module.dim, 2).float() / module.dim)
            module._set_cos_sin_cache(2048, "cpu", torch.float32)


if __name__ == "__main__":
    main(*sys.argv[1:])
