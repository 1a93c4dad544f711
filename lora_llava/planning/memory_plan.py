"""Settings that only trade memory for time, chosen from the model's shapes and the memory there is.

Nothing here changes what is learnt: the conversations of a step are the same whatever the micro-batch, recomputing
is exact, and dequantised weights have the values of the quantised ones. The one exception, Adam in 8 bits, is taken
only where fp32 would not fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from transformers import LlavaConfig

from lora_llava.data.sharing import Sharing, alone
from lora_llava.data.stage import StageRecords
from lora_llava.errors import RecipeError, TrainingError
from lora_llava.modeling.structure import ElementType, PartRow
from lora_llava.planning.memory import (
    Recompute,
    activation_bytes,
    expected_memory,
    held_bytes,
    in_4_bits,
    planned_parameters,
)
from lora_llava.planning.speed import Machine, relative_cost
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.stages import StageName, StageSettings
from lora_llava.system.device import free_memory_bytes

GIB = 1024**3
MOST_TOKENS = {"cuda": 8192, "cpu": 2048}
"""Tokens of a micro-batch beyond which nothing is gained: the matrices are busy."""
ROUNDING = 64
"""A row's tokens are chosen in such steps."""
CUDA_OVERHEAD = 1.0 * GIB
"""CUDA's context, cuBLAS's workspace, and one weight matrix dequantised."""
USABLE = 0.92
"""Share of the memory that is planned with; the rest goes to fragmentation."""
SMALLER = 0.85
"""Share of a plan's memory that the next smaller one may take."""
SHARE_OF_8BIT = 0.10
"""Time that 8-bit Adam must save to be taken where fp32 fits too."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What was chosen, and what it is expected to need."""

    tokens_per_micro_batch: int
    recompute: Recompute
    optim: str
    keep_dequantized: bool
    bytes_needed: int
    bytes_usable: int
    cost: float
    """Time for a token of the conversations; see `training.cost`."""

    def __str__(self) -> str:
        """Say in a line what was chosen."""
        weights = ", 4-bit weights unpacked once" if self.keep_dequantized else ""
        checkpointing = "no" if self.recompute.policy is False else str(self.recompute)
        return (
            f"{self.tokens_per_micro_batch:,} tokens per micro-batch, {checkpointing} gradient "
            f"checkpointing, {self.optim}{weights}; needs {self.bytes_needed / GIB:.1f} of "
            f"{self.bytes_usable / GIB:.1f} GiB"
        )


def plan_line(plan: MemoryPlan, settings: StageSettings, source: str) -> str:
    """Say what a plan sets, each value with where it is from: the recipe, or `source` where the recipe says `auto`."""
    values = {
        "tokens_per_micro_batch": (f"{plan.tokens_per_micro_batch:,}", settings.tokens_per_micro_batch),
        "gradient_checkpointing": (str(plan.recompute), settings.gradient_checkpointing),
        "optim": (plan.optim, settings.optim),
    }
    parts = [f"{name} {value} ({source if told == 'auto' else 'recipe'})" for name, (value, told) in values.items()]
    weights = "; 4-bit weights are dequantized once" if plan.keep_dequantized else ""
    needed, usable = plan.bytes_needed / GIB, plan.bytes_usable / GIB
    return f"memory plan: {', '.join(parts)}{weights}; needs {needed:.1f} of {usable:.1f} GiB"


def usable_bytes(device: str, memory: int | None = None) -> int:
    """Bytes to plan with: of a card of `memory` bytes, or of what is free on `device` (`cuda` or `cpu`) now."""
    if memory is not None:
        return int(USABLE * memory - (CUDA_OVERHEAD if device == "cuda" else 0))
    return int(USABLE * free_memory_bytes(device))


@dataclass(frozen=True, slots=True)
class StageShapes:
    """All of a stage that its memory and its speed depend on."""

    recipe: Recipe
    stage: StageName
    config: LlavaConfig
    table: list[PartRow]
    """Its parameters before quantisation; see `planned_parameters`."""
    dtype: ElementType
    longest: int
    """Tokens of the longest conversation: a micro-batch holds it whole."""
    sharing: Sharing = alone
    """What rows of a length compute of the conversations' tokens."""


def stage_shapes(
    recipe: Recipe, stage: StageName, config: LlavaConfig, dtype: ElementType, records: StageRecords
) -> StageShapes:
    """Collect what dry run, check and run plan a stage from.

    Raises RecipeError where a micro-batch of the given size does not hold the longest conversation.
    """
    settings = recipe.stage(stage)
    given, longest = settings.tokens_per_micro_batch, records.longest
    if given != "auto" and given < longest.length:
        raise RecipeError(
            f"stages.{stage}.tokens_per_micro_batch: is {given:,}, but {longest.where} has {longest.length:,} tokens, "
            f"and a micro-batch must hold the longest conversation; set auto, or {longest.length:,} or more, or a "
            f"lower stages.{stage}.max_length, which cuts conversations"
        )
    table = planned_parameters(recipe, stage, config, dtype)
    return StageShapes(recipe, stage, config, table, dtype, longest.length, records.sharing(settings))


def plan_memory(shapes: StageShapes, machine: Machine) -> MemoryPlan:
    """Choose what the recipe leaves to `auto`: the fastest that fits `machine`.

    Raises TrainingError if nothing fits, naming what would.
    """
    plans = list(_candidates(shapes, machine))
    fitting = [plan for plan in plans if plan.bytes_needed <= plan.bytes_usable]
    if not fitting:
        raise TrainingError(_too_small(min(plans, key=lambda plan: plan.bytes_needed), shapes))
    best = min(fitting, key=_preference)
    exact = [plan for plan in fitting if "8bit" not in plan.optim]
    if exact and "8bit" in best.optim:
        second = min(exact, key=_preference)
        return second if second.cost <= (1 + SHARE_OF_8BIT) * best.cost else best
    return best


def next_smaller(shapes: StageShapes, machine: Machine, chosen: MemoryPlan) -> str:
    """Say what to do after `chosen` ran out of memory: the plan for a good deal less, and the words that ask for it."""
    usable = int(SMALLER * min(chosen.bytes_needed, machine.usable))
    try:
        plan = plan_memory(shapes, replace(machine, usable=usable))
    except TrainingError as error:
        return str(error)
    size = (usable + (CUDA_OVERHEAD if machine.device == "cuda" else 0)) / USABLE
    return f"run it again with --memory {size / GIB:.1f}GiB, which plans {plan}"


def _preference(plan: MemoryPlan) -> tuple[float, int]:
    # Of plans that are as fast, the smaller.
    return round(plan.cost, 2), plan.bytes_needed


def _candidates(shapes: StageShapes, machine: Machine) -> Iterator[MemoryPlan]:
    """Yield a plan for every combination of what is left open, each with the row that suits it best."""
    recipe, config = shapes.recipe, shapes.config
    settings, nf4 = recipe.stage(shapes.stage), recipe.quantization.type == "nf4"
    kept = recipe.quantization.keep_dequantized
    keeping = [kept] if isinstance(kept, bool) else [False, True] if nf4 else [False]
    optimizers = ["adamw_torch", "paged_adamw_8bit"] if machine.device == "cuda" else ["adamw_torch"]
    quantized = in_4_bits(shapes.table, config, recipe.quantization, shapes.dtype)
    for dequantized, optim, recompute in product(
        keeping,
        optimizers if settings.optim == "auto" else [settings.optim],
        _recomputes(settings, int(config.text_config.num_hidden_layers)),
    ):
        parameters = shapes.table if dequantized or not nf4 else quantized
        fixed = sum(row.total for row in expected_memory(optim, parameters))
        reads_nf4 = nf4 and not dequantized
        rows = [
            MemoryPlan(
                tokens,
                recompute,
                optim,
                bool(dequantized),
                fixed + held_bytes(_activations(shapes, machine, recompute, tokens), recompute, machine.device),
                machine.usable,
                shapes.sharing(tokens)
                * relative_cost(config, machine, recompute, tokens, shapes.longest, dequantizes=reads_nf4),
            )
            for tokens in _sizes(settings, shapes.longest, MOST_TOKENS[machine.device])
        ]
        fitting = [plan for plan in rows if plan.bytes_needed <= plan.bytes_usable]
        yield min(fitting, key=_preference) if fitting else min(rows, key=lambda plan: plan.bytes_needed)


def _activations(shapes: StageShapes, machine: Machine, recompute: Recompute, tokens: int) -> int:
    """Estimate what a micro-batch needs whose tokens are all supervised."""
    rank = lora_rank(shapes.recipe, shapes.stage)
    return activation_bytes(shapes.config, recompute, tokens, tokens, shapes.dtype, rank, machine.attention)


def lora_rank(recipe: Recipe, stage: StageName) -> int:
    """Return the rank of the stage's LoRA; 0 where it has none."""
    return recipe.adapter.r if stage == "instruct" else 0


def _recomputes(settings: StageSettings, layers: int) -> list[Recompute]:
    wanted = settings.gradient_checkpointing
    if wanted != "auto":
        return [Recompute(wanted, settings.gradient_checkpointing_layers)]
    mixed = [Recompute("selective", layers * eighths // 8) for eighths in range(8)]
    return [Recompute(False), *dict.fromkeys(mixed), Recompute(True)]


def _sizes(settings: StageSettings, longest: int, most: int) -> list[int]:
    """List the rows to consider, in tokens: never less than the longest conversation has."""
    wanted = settings.tokens_per_micro_batch
    return [*range(most, longest, -ROUNDING), longest] if wanted == "auto" else [wanted]


def _too_small(smallest: MemoryPlan, shapes: StageShapes) -> str:
    stage = shapes.stage
    return (
        f"stage {stage}: the memory is too small: at the least {smallest.bytes_needed / GIB:.1f} GiB are needed, "
        f"{smallest.bytes_usable / GIB:.1f} GiB can be used ({smallest}). Lower adapter.r or stages.{stage}.max_length "
        f"(the longest conversation has {shapes.longest:,} tokens), or leave the memory settings at auto"
    )
