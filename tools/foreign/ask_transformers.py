"""Ask a merged model with plain transformers of any version: MODEL QUESTIONS OUTPUT."""

from __future__ import annotations

import sys
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tools.foreign.asked import read_questions, write_answers


def main(directory: str, questions: str, output: str) -> None:
    """Load everything by its directory alone, as users do."""
    model = LlavaForConditionalGeneration.from_pretrained(directory, torch_dtype=torch.float32).eval()
    ask(model, AutoProcessor.from_pretrained(directory), questions, output)


@torch.no_grad()
def ask(model: Any, processor: Any, questions: str, output: str, **settings: Any) -> None:
    """Answer greedily, in the processor's chat template. `settings`: further arguments of `generate`."""
    answers, logits = [], []
    for entry in read_questions(questions):
        content = [{"type": "image"}, {"type": "text", "text": entry["question"]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        with Image.open(entry["image"]) as image:
            inputs = processor(images=image.convert("RGB"), text=text, return_tensors="pt")
        generated = model.generate(
            **inputs,
            **settings,
            do_sample=False,
            max_new_tokens=entry["max_new_tokens"],
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits.append(generated.logits[0][0].float().numpy())
        answers.append(
            processor.decode(generated.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        )
    write_answers(output, answers, logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
