"""What each way to use several cards needs: `python -m tests.ways` prints the tables of docs/several_gpus.md.

Memory: the smallest plan of stage `instruct` in NF4 and bf16 for rows of 1,024 tokens, by the planner's own formulas;
a card adds 1 GiB for CUDA and 8 % for fragmentation. Traffic: what a card receives in an optimizer step; it sends as
much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

from transformers import LlavaConfig

from lora_llava.data.packing import PlanItem, RowSettings, sample_steps
from lora_llava.modeling.structure import BF16, FLEX, linear_weights
from lora_llava.planning.memory import Recompute, activation_bytes, expected_memory
from lora_llava.planning.memory_plan import GIB, StageShapes
from lora_llava.recipe.settings import Recipe
from tests.helpers.shapes import llava_7b, llava_13b

MODELS: dict[str, Callable[[], LlavaConfig]] = {"7B": llava_7b, "13B": llava_13b}
RANKS = (16, 64, 128)
TOKENS = 1024
_ROWS = 4
"""Rows of a card in a step, for the traffic."""
_FP32, _MOMENTS, _MOMENTS_8BIT = 4, 8, 2
"""Bytes a trained weight: of the weight or its gradient, and of AdamW's two averages."""


@cache
def shapes_of(model: str, rank: int) -> StageShapes:
    """Return the shapes of stage `instruct`."""
    recipe = Recipe.model_validate(
        {
            "name": "ways",
            "base": {"model_name_or_path": "llava"},
            "adapter": {"r": rank, "lora_alpha": 2.0 * rank},
            "stages": {"instruct": {"data": {"path": "train.json"}}},
        }
    )
    items = [PlanItem(TOKENS, 0, -1) for _ in range(8)]
    steps = sample_steps(items, RowSettings(TOKENS, 1), batch_size=8, num_steps=1, seed=0)
    parts = recipe.stage("instruct"), recipe.quantization, recipe.adapter
    return StageShapes("instruct", *parts, MODELS[model](), BF16, TOKENS, steps)


def trained(shapes: StageShapes) -> int:
    """Count the trained weights."""
    return sum(part.trainable for part in shapes.parameters)


def memory(shapes: StageShapes, cards: int, per_trained: float) -> float:
    """Return the GiB that a card needs; `per_trained`: bytes of gradient and optimizer for each trained weight."""
    held = replace(shapes, shards=cards).held_parameters(keep_dequantized=False)
    activations = activation_bytes(shapes.config, shapes.layers(FLEX), Recompute(True), TOKENS, TOKENS)
    return (sum(part.bytes for part in held) + per_trained * trained(shapes) + activations) / GIB


def offloaded_memory(shapes: StageShapes) -> float:
    """Return the GiB that a card needs with the optimizer on the host, and of the gradients a bucket on the card."""
    held = shapes.held_parameters(keep_dequantized=False)
    parts = sum(part.total for part in expected_memory("adamw_torch", held, offloads=True))
    return memory(shapes, 1, 0.0) + (parts - sum(part.bytes for part in held)) / GIB


def memory_columns(shapes: StageShapes) -> dict[str, float]:
    """Return the GiB of each way.

    ZeRO-2 without offload, which is refused, is on paper: it divides gradients and moments, and adds a flat fp32 copy;
    its buckets are not counted.
    """
    in_8_bits, in_fp32 = _FP32 + _MOMENTS_8BIT, _FP32 + _MOMENTS
    return {
        "each card whole, 8-bit Adam": memory(shapes, 1, in_8_bits),
        "each card whole, AdamW": memory(shapes, 1, in_fp32),
        "sharded over 2, 8-bit Adam": memory(shapes, 2, in_8_bits),
        "sharded over 4, 8-bit Adam": memory(shapes, 4, in_8_bits),
        "ZeRO-2 over 2": memory(shapes, 1, _FP32 + (_FP32 + _MOMENTS) / 2),
        "ZeRO-2, offloaded": offloaded_memory(shapes),
    }


def smallest_way(shapes: StageShapes, size: int) -> str:
    """Return the way to take on cards of `size` GiB: the first that fits, since each is slower than the one before."""
    usable = 0.92 * size - 1.0
    columns = memory_columns(shapes)
    for name, way in (
        ("each card whole, AdamW", "whole"),
        ("each card whole, 8-bit Adam", "whole, 8-bit"),
        ("ZeRO-2, offloaded", "deepspeed, 2 cards"),
        ("sharded over 2, 8-bit Adam", "shard, 2 cards"),
        ("sharded over 4, 8-bit Adam", "shard, 4 cards"),
    ):
        if columns[name] <= usable:
            return way
    return "-"


def traffic(shapes: StageShapes, cards: int) -> dict[str, float]:
    """Return the GB that a card receives in a step of `_ROWS` rows."""
    share, weights = (cards - 1) / cards, trained(shapes)
    # A ring adds up in two passes; ZeRO-2 sends each card its part of the sums after every row, then all new weights.
    sums = 2 * share * _FP32 * weights
    gathered = 2 * share * 0.5 * linear_weights(shapes.config) * _ROWS
    zero2 = share * _FP32 * weights * (_ROWS + 1)
    return {"each card whole": sums / 1e9, "sharded": (sums + gathered) / 1e9, "ZeRO-2": zero2 / 1e9}


def tables() -> str:
    """Return both tables as Markdown."""
    cases = [(model, rank, shapes_of(model, rank)) for model in MODELS for rank in RANKS]
    names, sizes = list(memory_columns(cases[0][2])), (8, 12, 16, 24)
    heads = [*names, *(f"{size} GiB cards" for size in sizes)]
    lines = [f"| model, rank | {' | '.join(heads)} |", "|---|" + "--:|" * len(names) + "---|" * len(sizes)]
    for model, rank, shapes in cases:
        cells = [f"{value:.1f}" for value in memory_columns(shapes).values()]
        lines.append(f"| {model}, {rank} | {' | '.join([*cells, *(smallest_way(shapes, size) for size in sizes)])} |")
    ways = list(traffic(cases[0][2], 2))
    lines += [
        "",
        f"| GB a step of {_ROWS} rows a card | {' | '.join(f'{way}, {n} cards' for n in (2, 4) for way in ways)} |",
    ]
    lines.append("|---|" + "--:|" * (2 * len(ways)))
    for model, rank, shapes in cases:
        cells = [f"{value:.2f}" for cards in (2, 4) for value in traffic(shapes, cards).values()]
        lines.append(f"| {model}, {rank} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())  # noqa: T201 - the output is the tables
