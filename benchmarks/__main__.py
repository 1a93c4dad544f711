"""What tree packing gains on this machine: the same questions with packing on and off, in turn, on random weights.

    python -m benchmarks [--steps 5] [--output results.json]

Both sides train the same conversations in the same steps; their losses must agree before a ratio is printed.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import click
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from lora_llava.artifact import library_versions
from lora_llava.conversation import IGNORE_INDEX, Encoded
from lora_llava.data.batch import Batch, build_row
from lora_llava.data.packing import Packing, PlanItem, make_plan
from lora_llava.modeling.packed import packed_loss
from lora_llava.modeling.stages import build_stage
from lora_llava.recipe import AdapterSettings

IMAGE_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 576, 40, 5
IMAGE_ID = 3
QUESTIONS_PER_STEP = 16


def model_of(seed: int) -> Any:
    """Build a small LLaVA with random weights and the image tokens of the real one, with LoRA."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=4096,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID, attn_implementation="sdpa")
    return build_stage(LlavaForConditionalGeneration(config), "instruct", AdapterSettings(r=16, lora_alpha=32.0))


def conversation(seed: int) -> Encoded:
    """Make one question about an image, of random words."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(10, 4096, (QUESTION_TOKENS + ANSWER_TOKENS,), generator=generator).tolist()
    prefix = [1, *[IMAGE_ID] * IMAGE_TOKENS]
    labels = [IGNORE_INDEX] * (len(prefix) + QUESTION_TOKENS) + words[QUESTION_TOKENS:]
    return Encoded(prefix + words, labels, len(prefix))


def rows_of(packing: Packing, questions_per_image: int) -> list[Batch]:
    """Lay out one step's rows."""
    encoded = [conversation(number) for number in range(QUESTIONS_PER_STEP)]
    items = [
        PlanItem(len(one.input_ids), one.prefix_length, number // questions_per_image)
        for number, one in enumerate(encoded)
    ]
    plan = make_plan(
        items,
        batch_size=QUESTIONS_PER_STEP,
        tokens_per_row=1280,
        branches_per_tree=questions_per_image,
        packing=packing,
        num_train_epochs=1.0,
        max_steps=1,
        seed=0,
    )
    rows = []
    for row in plan.steps[0]:
        batch = build_row([[encoded[index] for index in tree] for tree in row])
        batch["pixel_values"] = torch.zeros(len(row), 3, 336, 336)
        rows.append(batch)
    return rows


def step(model: Any, rows: list[Batch]) -> tuple[float, float]:
    """Run one step's forward and backward passes; returns its loss and its seconds."""
    model.zero_grad()
    started = time.perf_counter()
    supervised = sum(len(row["labels"]) for row in rows)
    total = 0.0
    for row in rows:
        loss = packed_loss(model, row, supervised)
        loss.backward()
        total += float(loss.detach())
    return total, time.perf_counter() - started


def compare(questions_per_image: int, steps: int) -> dict[str, float]:
    """Time packing on and off in turn, and take the median."""
    model = model_of(0)
    names: tuple[Packing, Packing] = ("tree", "none")
    rows = {name: rows_of(name, questions_per_image) for name in names}
    losses = {name: step(model, rows[name])[0] for name in names}
    if abs(losses["tree"] - losses["none"]) > 1e-5 * abs(losses["none"]):
        raise click.ClickException(f"the losses differ, so no ratio is given: {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(steps):
        for name in names:
            seconds[name].append(step(model, rows[name])[1])
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "questions_per_image": questions_per_image,
        "loss": losses["tree"],
        "questions_per_second_tree": round(QUESTIONS_PER_STEP / median["tree"], 2),
        "questions_per_second_none": round(QUESTIONS_PER_STEP / median["none"], 2),
        "ratio": round(median["none"] / median["tree"], 2),
    }


@click.command()
@click.option("--steps", default=5, show_default=True, help="Timed steps of each side.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the results as JSON.")
def main(steps: int, output: Path | None) -> None:
    """Compare packing on and off for 1, 4 and 8 questions an image."""
    results = []
    for questions_per_image in (1, 4, 8):
        results.append(compare(questions_per_image, steps))
        click.echo(json.dumps(results[-1]))
    if output is not None:
        report = {"machine": platform.machine(), "versions": library_versions(), "results": results}
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
