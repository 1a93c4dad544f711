"""Settings that only trade memory for time, chosen from the model's shapes and the memory there is.

Nothing here changes what is learnt: the conversations of a step are the same whatever the micro-batch, recomputing
is exact, and dequantised weights have the values of the quantised ones. The one exception, Adam in 8 bits, is taken
only where fp32 would not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from transformers import LlavaConfig

from lora_llava.device import free_memory_bytes
from lora_llava.errors import TrainingError
from lora_llava.modeling.stages import PartRow
from lora_llava.recipe import Recipe
from lora_llava.recipe_stages import StageName, StageSettings
from lora_llava.training.memory import Recompute, activation_bytes, expected_memory, in_4_bits

GIB = 1024**3
MOST_TOKENS = {"cuda": 8192, "cpu": 512}
"""Tokens of a micro-batch beyond which nothing is gained: the matrices are busy, and attention grows."""
ROUNDING = 64
"""A row's tokens are chosen in such steps."""
CUDA_OVERHEAD = 1.0 * GIB
"""CUDA's context, cuBLAS's workspace, and one weight matrix dequantised."""
USABLE = 0.92
"""Share of the memory that is planned with; the rest goes to fragmentation."""
DEQUANTIZING = {"cuda": 176, "cpu": 60}
"""Reading NF4 once takes as long as so many tokens' forward pass. CUDA: 2.5 bytes a weight at 70 % of an RTX 4090's
1 TB/s, against 2 FLOP a weight and token at 60 % of its 165 TFLOP/s. CPU: measured on 2 AVX2 cores."""
FORWARD_OF_SELECTIVE = 0.25
"""Share of a forward pass that selective recomputing repeats (FLOPs counted on Llama layers with LoRA)."""
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
    """Time for a token, relative: 2 is a forward and a backward pass with nothing repeated."""

    def __str__(self) -> str:
        """Say in a line what was chosen."""
        weights = ", weights dequantised once" if self.keep_dequantized else ""
        return (
            f"{self.tokens_per_micro_batch:,} tokens a micro-batch, recomputing {self.recompute}, {self.optim}"
            f"{weights}: {self.bytes_needed / GIB:.1f} of {self.bytes_usable / GIB:.1f} GiB"
        )


def usable_bytes(device: torch.device, memory: int | None = None) -> int:
    """Bytes to plan with: of a card of `memory` bytes, or of what is free on `device` now."""
    if memory is not None:
        return int(USABLE * memory - (CUDA_OVERHEAD if device.type == "cuda" else 0))
    return int(USABLE * free_memory_bytes(device))


def plan_memory(
    recipe: Recipe,
    stage: StageName,
    config: LlavaConfig,
    table: list[PartRow],
    dtype: torch.dtype,
    *,
    longest: int,
    usable: int,
    device: str,
) -> MemoryPlan:
    """Choose what the recipe leaves to `auto`: the fastest that fits `usable` bytes.

    `table`: the stage's parameters before quantisation. `longest` is the longest conversation, in tokens: a
    micro-batch holds it whole. Raises TrainingError if nothing
    fits, naming what would.
    """
    plans = list(_candidates(recipe, stage, config, table, dtype, longest, usable, device))
    fitting = [plan for plan in plans if plan.bytes_needed <= usable]
    if not fitting:
        raise TrainingError(_too_small(min(plans, key=lambda plan: plan.bytes_needed), stage, longest))
    best = min(fitting, key=_preference)
    exact = [plan for plan in fitting if "8bit" not in plan.optim]
    if exact and "8bit" in best.optim:
        second = min(exact, key=_preference)
        return second if second.cost <= (1 + SHARE_OF_8BIT) * best.cost else best
    return best


def _preference(plan: MemoryPlan) -> tuple[float, int]:
    # Of plans that are as fast, the smaller.
    return round(plan.cost, 2), plan.bytes_needed


def _candidates(
    recipe: Recipe,
    stage: StageName,
    config: LlavaConfig,
    table: list[PartRow],
    dtype: torch.dtype,
    longest: int,
    usable: int,
    device: str,
) -> Iterator[MemoryPlan]:
    """Yield a plan for every combination of what is left open, with as many tokens as fit (at least `longest`)."""
    settings, nf4 = recipe.stage(stage), recipe.quantization.type == "nf4"
    kept = recipe.quantization.keep_dequantized
    keeping = [kept] if isinstance(kept, bool) else [False, True] if nf4 else [False]
    optimizers = ["adamw_torch", "paged_adamw_8bit"] if device == "cuda" else ["adamw_torch"]
    layers = int(config.text_config.num_hidden_layers)
    rank = lora_rank(recipe, stage)
    quantized = in_4_bits(table, config, recipe.quantization, dtype)
    for dequantized, optim, recompute in product(
        keeping, optimizers if settings.optim == "auto" else [settings.optim], _recomputes(settings, layers)
    ):
        parameters = table if dequantized or not nf4 else quantized
        fixed = sum(row.total for row in expected_memory(optim, parameters))

        def needed(tokens: int, fixed: int = fixed, recompute: Recompute = recompute) -> int:
            return fixed + activation_bytes(config, recompute, tokens, tokens, dtype, rank)

        tokens = _tokens(settings, longest, MOST_TOKENS[device], lambda tokens: needed(tokens) <= usable)
        dequantizing = DEQUANTIZING[device] / tokens if nf4 and not dequantized else 0.0
        repeated = _repeated(recompute, layers)
        cost = 2 + repeated + (2 + repeated) * dequantizing
        yield MemoryPlan(tokens, recompute, optim, bool(dequantized), needed(tokens), usable, cost)


def lora_rank(recipe: Recipe, stage: StageName) -> int:
    """Return the rank of the stage's LoRA; 0 where it has none."""
    return recipe.adapter.r if stage == "instruct" else 0


def _recomputes(settings: StageSettings, layers: int) -> list[Recompute]:
    wanted = settings.gradient_checkpointing
    if wanted != "auto":
        return [Recompute(wanted, settings.gradient_checkpointing_layers)]
    mixed = [Recompute("selective", layers * eighths // 8) for eighths in range(8)]
    return [Recompute(False), *dict.fromkeys(mixed), Recompute(True)]


def _tokens(settings: StageSettings, longest: int, most: int, fits: Callable[[int], bool]) -> int:
    """Choose as many tokens as fit, up to `most`, and never fewer than the longest conversation has."""
    wanted = settings.tokens_per_micro_batch
    if wanted != "auto":
        return wanted
    sizes = range(most, longest, -ROUNDING)
    return next((size for size in sizes if fits(size)), longest)


def _repeated(recompute: Recompute, layers: int) -> float:
    """Share of a forward pass that is computed twice."""
    if recompute.policy is False:
        return 0.0
    full = layers if recompute.policy is True else recompute.full_layers
    return (full + (layers - full) * FORWARD_OF_SELECTIVE) / layers


def _too_small(smallest: MemoryPlan, stage: StageName, longest: int) -> str:
    return (
        f"stage {stage}: the memory is too small: at the least {smallest.bytes_needed / GIB:.1f} GiB are needed, "
        f"{smallest.bytes_usable / GIB:.1f} GiB can be used ({smallest}). Lower adapter.r or stages.{stage}.max_length "
        f"(the longest conversation has {longest:,} tokens), or leave the memory settings at auto"
    )
