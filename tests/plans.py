"""The plans of LLaVA-1.5-7B on several machines: `python -m tests.plans` prints the table of docs/memory.md."""

from __future__ import annotations

import random
from functools import cache

from lora_llava.data.packing import PlanItem, RowSettings, SampledSteps, sample_steps
from lora_llava.modeling.structure import BF16, FLEX
from lora_llava.planning.memory_plan import GIB, MemoryPlan, StageShapes, plan_memory, usable_bytes
from lora_llava.planning.speed import Machine, Speed
from lora_llava.recipe.settings import Recipe
from tests.helpers.shapes import llava_7b

SPEEDS = {
    "H100, slow host": Speed(9600.0, 1.0, 340.0),
    "H100, CUDA graphs": Speed(400.0, 1.0, 340.0),
    "RTX 4090": Speed(250.0, 1.0, 150.0),
    "former constants": Speed(120.0, 1.0, 176.0),
}
"""Launching and dequantizing, in tokens that are computed meanwhile."""
CASES = [(size, rank, questions) for size in (24, 12) for rank in (128, 16) for questions in (11, 4, 1)]
"""GiB of a card, rank of LoRA, questions about an image."""
_BATCH, _STEPS, _PREFIX = 44, 4, 600


def items_of(questions: int) -> list[PlanItem]:
    """Return the conversations of a few steps, with `questions` of them about each image."""
    rng = random.Random(questions)
    return [PlanItem(_PREFIX + rng.randint(28, 55), _PREFIX, n // questions) for n in range(_BATCH * _STEPS)]


def row_settings(questions: int, tokens: int) -> RowSettings:
    """Return how the conversations of `items_of` become rows."""
    return RowSettings(tokens, branches_per_tree=questions)


@cache
def steps_of(questions: int) -> SampledSteps:
    """Return the steps of `items_of`."""
    settings = row_settings(questions, 0)
    return sample_steps(items_of(questions), settings, batch_size=_BATCH, num_steps=_STEPS, seed=0)


def shapes_of(rank: int, questions: int) -> StageShapes:
    """Return the shapes of stage `instruct` with everything at `auto`."""
    recipe = Recipe.model_validate(
        {
            "name": "plans",
            "base": {"model_name_or_path": "llava"},
            "adapter": {"r": rank, "lora_alpha": 2.0 * rank},
            "stages": {"instruct": {"data": {"path": "train.json"}}},
        }
    )
    longest = max(item.length for item in items_of(questions))
    parts = recipe.stage("instruct"), recipe.quantization, recipe.adapter
    return StageShapes("instruct", *parts, llava_7b(), BF16, longest, steps_of(questions))


@cache
def plan_of(machine: str, size: int, rank: int, questions: int) -> MemoryPlan:
    """Plan for a card of `size` GiB."""
    card = Machine("cuda", usable_bytes("cuda", size * GIB), FLEX, SPEEDS[machine])
    return plan_memory(shapes_of(rank, questions), card)


def table() -> str:
    """Return the plans as a Markdown table."""
    names = [f"{name} ({speed.launching:,.0f}/{speed.dequantizing:.0f})" for name, speed in SPEEDS.items()]
    lines = [f"| GiB | rank | questions per image | {' | '.join(names)} |", "|--:" * 3 + "|---" * len(names) + "|"]
    for size, rank, questions in CASES:
        plans = [_cell(plan_of(name, size, rank, questions), questions) for name in SPEEDS]
        lines.append(f"| {size} | {rank} | {questions} | {' | '.join(plans)} |")
    return "\n".join(lines)


def _cell(plan: MemoryPlan, questions: int) -> str:
    lengths = steps_of(questions).row_lengths(plan.tokens_per_micro_batch)
    rows, longest = int((lengths > 0).sum()) / len(lengths), int(lengths.max())
    words = [f"{rows:g} x {longest:,}", str(plan.recompute)]
    words += ["dequantized once"] if plan.keep_dequantized else []
    words += ["8-bit Adam"] if "8bit" in plan.optim else []
    return ", ".join(words)


if __name__ == "__main__":
    print(table())  # noqa: T201 - the output is the table
