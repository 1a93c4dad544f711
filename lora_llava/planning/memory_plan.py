"""Choose the settings that trade memory for time, from the model's shapes and the memory available.

None of them changes what a stage learns: a step has the same conversations whatever the micro-batch, recomputation is
exact, and dequantized weights have the values of the quantized ones. The one exception, 8-bit Adam, is chosen only
where fp32 Adam does not fit or is much slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from transformers import LlavaConfig

from lora_llava.data.packing import Sharing, no_sharing
from lora_llava.data.stage import StageRecords
from lora_llava.errors import RecipeError, TrainingError
from lora_llava.formats.shapes import LlavaShape
from lora_llava.modeling.structure import Attention, ElementType, PartParameters, is_fused, stage_parameters
from lora_llava.planning.memory import (
    LayerSettings,
    Recompute,
    activation_bytes,
    expected_memory,
    held_bytes,
    in_4_bits,
    plain_scale_bytes,
)
from lora_llava.planning.speed import Machine, relative_cost
from lora_llava.recipe.settings import AdapterSettings, QuantizationSettings
from lora_llava.recipe.stages import StageName, StageSettings
from lora_llava.system.device import free_memory_bytes

GIB = 1024**3
_MAX_TOKENS = {"cuda": 8192, "cpu": 2048}
"""Largest micro-batch that `auto` considers, in tokens: beyond it the matmuls are saturated."""
_TOKEN_STEP = 64
"""`auto` considers micro-batches that differ by this many tokens."""
_CUDA_OVERHEAD = 1.0 * GIB
"""CUDA context, cuBLAS workspace, and one dequantized weight matrix."""
_USABLE_SHARE = 0.92
"""Share of the memory to plan with; the rest is left to fragmentation."""
_RETRY_SHARE = 0.85
"""After running out of memory, the next plan may use this share of the failed plan's memory."""
_MIN_8BIT_GAIN = 0.10
"""8-bit Adam is chosen over fp32 Adam that fits only if it saves this share of the time."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The chosen settings, and the memory and time they are expected to take."""

    tokens_per_micro_batch: int
    recompute: Recompute
    optim: str
    keep_dequantized: bool
    bytes_needed: int
    bytes_usable: int
    cost: float
    """Relative time per token of the conversations; see `planning.speed`."""


@dataclass(frozen=True, slots=True)
class StageShapes:
    """Everything that the memory and the speed of a stage depend on."""

    stage: StageName
    settings: StageSettings
    quantization: QuantizationSettings
    adapter: AdapterSettings
    config: LlavaConfig
    dtype: ElementType
    """Compute precision."""
    longest: int
    """Tokens of the longest conversation, which a micro-batch must hold whole."""
    sharing: Sharing = no_sharing
    """Maps a row length to the fraction of unpacked tokens that packing still computes."""

    @property
    def parameters(self) -> list[PartParameters]:
        """Count the parameters of each part, before quantization."""
        return stage_parameters(LlavaShape.of(self.config.to_dict()), self.stage, self.adapter, self.dtype)

    def layers(self, attention: Attention) -> LayerSettings:
        """Return what decides how much a decoder layer keeps, with this attention."""
        return LayerSettings(
            dtype=self.dtype,
            lora_rank=self.adapter.r if self.settings.trains_lora else 0,
            lora_parameters=sum(part.adapter for part in self.parameters),
            attention=attention,
            is_fused=is_fused(self.config.text_config, self.adapter if self.settings.trains_lora else None),
        )


def stage_shapes(
    stage: StageName,
    settings: StageSettings,
    quantization: QuantizationSettings,
    adapter: AdapterSettings,
    config: LlavaConfig,
    dtype: ElementType,
    records: StageRecords,
) -> StageShapes:
    """Collect what `plan_memory` needs.

    Raises RecipeError if the recipe's `tokens_per_micro_batch` cannot hold the longest conversation.
    """
    given, longest = settings.tokens_per_micro_batch, records.longest
    if given != "auto" and given < longest.length:
        raise RecipeError(
            f"stages.{stage}.tokens_per_micro_batch: is {given:,}, but {longest.where} has {longest.length:,} tokens, "
            f"and a micro-batch must hold the longest conversation; set auto, or {longest.length:,} or more, or a "
            f"lower stages.{stage}.max_length, which cuts conversations"
        )
    sharing = records.sharing(settings)
    return StageShapes(stage, settings, quantization, adapter, config, dtype, longest.length, sharing)


def usable_bytes(device: str, memory: int | None = None) -> int:
    """Return the bytes to plan with: of a card of `memory` bytes, or of what is free on `device` (`cuda`, `cpu`)."""
    if memory is not None:
        return int(_USABLE_SHARE * memory - (_CUDA_OVERHEAD if device == "cuda" else 0))
    return int(_USABLE_SHARE * free_memory_bytes(device))


def plan_memory(shapes: StageShapes, machine: Machine) -> MemoryPlan:
    """Choose what the recipe leaves at `auto`: the fastest plan that fits `machine`.

    Raises TrainingError if nothing fits, with the least that would.
    """
    plans = list(_candidates(shapes, machine))
    fitting = [plan for plan in plans if plan.bytes_needed <= plan.bytes_usable]
    if not fitting:
        raise TrainingError(_too_small(min(plans, key=lambda plan: plan.bytes_needed), shapes))
    best = min(fitting, key=_preference)
    full_precision = [plan for plan in fitting if "8bit" not in plan.optim]
    if full_precision and "8bit" in best.optim:
        fp32 = min(full_precision, key=_preference)
        return fp32 if fp32.cost <= (1 + _MIN_8BIT_GAIN) * best.cost else best
    return best


def has_room_for_scales(plan: MemoryPlan, config: LlavaConfig) -> bool:
    """Return whether a plan leaves the memory for the scales of NF4 weights in fp32; it decides speed alone."""
    return plan.bytes_needed + plain_scale_bytes(config) <= plan.bytes_usable


def plan_line(plan: MemoryPlan, shapes: StageShapes, source: str = "auto") -> str:
    """Name each planned setting with its value and origin: the recipe, or `source` where the recipe says `auto`."""
    settings = shapes.settings
    values = {
        "tokens_per_micro_batch": (f"{plan.tokens_per_micro_batch:,}", settings.tokens_per_micro_batch),
        "gradient_checkpointing": (str(plan.recompute), settings.gradient_checkpointing),
        "optim": (plan.optim, settings.optim),
    }
    if shapes.quantization.type == "nf4":
        kept = str(plan.keep_dequantized).lower()
        values["keep_dequantized"] = (kept, shapes.quantization.keep_dequantized)
    origins = [
        f"{name}: {value} ({source if set_to == 'auto' else 'recipe'})" for name, (value, set_to) in values.items()
    ]
    needed, usable = plan.bytes_needed / GIB, plan.bytes_usable / GIB
    return f"{', '.join(origins)}; needs {needed:.1f} of {usable:.1f} GiB"


def next_smaller(shapes: StageShapes, machine: Machine, failed: MemoryPlan) -> str:
    """Say what to do after `failed` ran out of memory: the option that asks for a clearly smaller plan."""
    usable = int(_RETRY_SHARE * min(failed.bytes_needed, machine.usable))
    try:
        plan = plan_memory(shapes, replace(machine, usable=usable))
    except TrainingError as error:
        return str(error)
    size = (usable + (_CUDA_OVERHEAD if machine.device == "cuda" else 0)) / _USABLE_SHARE
    return f"run it again with --memory {size / GIB:.1f}GiB, which plans {plan_line(plan, shapes)}"


def _preference(plan: MemoryPlan) -> tuple[float, int]:
    # Of equally fast plans, prefer the one that needs less memory.
    return round(plan.cost, 2), plan.bytes_needed


def _candidates(shapes: StageShapes, machine: Machine) -> Iterator[MemoryPlan]:
    """Yield one plan for each combination of the open choices, with the micro-batch that suits it best."""
    settings, config, nf4 = shapes.settings, shapes.config, shapes.quantization.type == "nf4"
    unquantized = shapes.parameters
    quantized = in_4_bits(unquantized, config, shapes.quantization, shapes.dtype)
    for keep_dequantized, optim, recompute in product(
        _keep_dequantized_choices(shapes.quantization), _optimizers(settings, machine.device), _recomputes(shapes)
    ):
        # Fixed by the combination: weights, gradients and optimizer states.
        parameters = unquantized if keep_dequantized or not nf4 else quantized
        fixed = sum(part.total for part in expected_memory(optim, parameters))
        reads_nf4 = nf4 and not keep_dequantized

        # What grows with the micro-batch, whose tokens may all be supervised.
        plans = [
            MemoryPlan(
                tokens,
                recompute,
                optim,
                keep_dequantized,
                fixed + held_bytes(_activations(shapes, machine, recompute, tokens), recompute, machine.device),
                machine.usable,
                shapes.sharing(tokens)
                * relative_cost(config, machine, recompute, tokens, shapes.longest, dequantizes=reads_nf4),
            )
            for tokens in _micro_batch_sizes(settings, shapes.longest, _MAX_TOKENS[machine.device])
        ]
        fitting = [plan for plan in plans if plan.bytes_needed <= plan.bytes_usable]
        yield min(fitting, key=_preference) if fitting else min(plans, key=lambda plan: plan.bytes_needed)


def _activations(shapes: StageShapes, machine: Machine, recompute: Recompute, tokens: int) -> int:
    return activation_bytes(shapes.config, shapes.layers(machine.attention), recompute, tokens, tokens)


def _keep_dequantized_choices(quantization: QuantizationSettings) -> list[bool]:
    if quantization.keep_dequantized != "auto":
        return [quantization.keep_dequantized]
    return [False, True] if quantization.type == "nf4" else [False]


def _optimizers(settings: StageSettings, device: str) -> list[str]:
    if settings.optim != "auto":
        return [settings.optim]
    return ["adamw_torch", "paged_adamw_8bit"] if device == "cuda" else ["adamw_torch"]


def _recomputes(shapes: StageShapes) -> list[Recompute]:
    policy, layers = shapes.settings.gradient_checkpointing, int(shapes.config.text_config.num_hidden_layers)
    if policy != "auto":
        return [Recompute(policy, shapes.settings.gradient_checkpointing_layers)]
    mixed = [Recompute("selective", layers * eighths // 8) for eighths in range(8)]
    return [Recompute(False), *dict.fromkeys(mixed), Recompute(True)]


def _micro_batch_sizes(settings: StageSettings, longest: int, largest: int) -> list[int]:
    """List the micro-batches to consider, in tokens; each holds the longest conversation."""
    tokens = settings.tokens_per_micro_batch
    return [*range(largest, longest, -_TOKEN_STEP), longest] if tokens == "auto" else [tokens]


def _too_small(smallest: MemoryPlan, shapes: StageShapes) -> str:
    stage = shapes.stage
    return (
        f"stage {stage}: not enough memory: at least {smallest.bytes_needed / GIB:.1f} GiB are needed, "
        f"{smallest.bytes_usable / GIB:.1f} GiB can be used ({plan_line(smallest, shapes)}). Lower adapter.r or "
        f"stages.{stage}.max_length (the longest conversation has {shapes.longest:,} tokens), or leave the memory "
        "settings at auto"
    )
