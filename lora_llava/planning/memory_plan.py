"""Choose the settings that trade memory for time, from the model's shapes and the memory available.

None of them changes what a stage learns: a step has the same conversations whatever the micro-batch, recomputation is
exact, and dequantized weights have the values of the quantized ones. The one exception, 8-bit Adam, is chosen only
where fp32 Adam does not fit or is much slower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from transformers import LlavaConfig

from lora_llava.data.packing import SampledSteps
from lora_llava.data.stage import StageRecords
from lora_llava.errors import RecipeError, TrainingError
from lora_llava.formats.shapes import LlavaShape
from lora_llava.modeling.structure import FLEX, Attention, ElementType, PartParameters, is_fused, stage_parameters
from lora_llava.planning.graphs import graph_bytes
from lora_llava.planning.memory import (
    LayerSettings,
    Recompute,
    activation_bytes,
    expected_memory,
    held_bytes,
    in_4_bits,
    plain_scale_bytes,
    sharded,
)
from lora_llava.planning.speed import Machine, Passes, Speed, relative_cost
from lora_llava.recipe.settings import AdapterSettings, QuantizationSettings, Recipe
from lora_llava.recipe.stages import StageName, StageSettings
from lora_llava.system.device import free_memory_bytes
from lora_llava.system.ranks import world_size

GIB = 1024**3
_MAX_TOKENS = {"cuda": 8192, "cpu": 2048}
"""Largest micro-batch that `auto` considers, in tokens: beyond it the matmuls are saturated."""
_TOKEN_STEP = 64
"""`auto` considers micro-batches that differ by this many tokens."""
_CUDA_OVERHEAD = 1.0 * GIB
"""CUDA context, cuBLAS workspace, and one dequantized weight matrix."""
_LINK_BYTES = 0.4 * GIB
"""Buffers through which the processes of several cards exchange gradients (NCCL's, and one bucket), an estimate."""
_USABLE_SHARE = 0.92
"""Share of the memory to plan with; the rest is left to fragmentation."""
_RETRY_SHARE = 0.85
"""After running out of memory, the next plan may use this share of the failed plan's memory."""
_AS_FAST = 1.005
"""Plans that take at most this many times as long as the fastest count as equally fast."""
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
    speed: Speed
    """The speed that the plan was made with."""
    graphs: bool = False
    """Whether the decoder layers are to run as CUDA graphs; a trial before the first step decides."""


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
    steps: SampledSteps
    """The first steps, whose rows are counted for each row length."""
    shards: int = 1
    """Number of processes that the frozen weights of the decoder layers are divided between."""
    offloads: bool = False
    """Whether gradients and optimizer are divided between the hosts of several processes."""

    @property
    def parameters(self) -> list[PartParameters]:
        """Count the parameters of each part, before quantization."""
        return stage_parameters(LlavaShape.of(self.config.to_dict()), self.stage, self.adapter, self.dtype)

    @property
    def is_fused(self) -> bool:
        """Whether the decoder layers train fused."""
        return is_fused(self.config.text_config, self.adapter if self.settings.trains_lora else None)

    def held_parameters(self, *, keep_dequantized: bool) -> list[PartParameters]:
        """Count the parameters of each part as a process holds them: quantized or dequantized, whole or sharded."""
        parameters, itemsize = self.parameters, float(self.dtype.itemsize)
        if self.quantization.type == "nf4" and not keep_dequantized:
            parameters, itemsize = in_4_bits(parameters, self.config, self.quantization, self.dtype), 0.5
        return sharded(parameters, self.config, itemsize, self.shards)

    def layers(self, attention: Attention) -> LayerSettings:
        """Return what decides how much a decoder layer keeps, with this attention."""
        return LayerSettings(
            dtype=self.dtype,
            lora_rank=self.adapter.r if self.settings.trains_lora else 0,
            lora_parameters=sum(part.adapter for part in self.parameters),
            attention=attention,
            is_fused=self.is_fused,
        )

    def passes(self, recompute: Recompute, *, keep_dequantized: bool, graphs: bool = False) -> Passes:
        """Describe how the layers compute a row with these choices."""
        layers = int(self.config.text_config.num_hidden_layers)
        return Passes(layers, recompute, self.quantization.type == "nf4", keep_dequantized, self.is_fused, graphs)

    def may_use_graphs(self, machine: Machine) -> bool:
        """Tell whether decoder layers can run as CUDA graphs, and it is known how long their kernels take to launch.

        Not with dropout, whose random numbers a graph would repeat; nor with several processes, whose gradients are
        added up outside of graphs; nor with SDPA, whose shapes depend on the trees of a row.
        """
        is_possible = self.is_fused and world_size() == 1 and machine.attention == FLEX and machine.device == "cuda"
        dropout = self.adapter.lora_dropout if self.settings.trains_lora else 0.0
        return is_possible and dropout == 0 and machine.speed.is_measured and self.settings.cuda_graphs == "auto"


def stage_shapes(
    recipe: Recipe, stage: StageName, config: LlavaConfig, dtype: ElementType, records: StageRecords
) -> StageShapes:
    """Collect what `plan_memory` needs.

    Raises RecipeError if the recipe's `tokens_per_micro_batch` cannot hold the longest conversation.
    """
    settings = recipe.stage(stage)
    given, longest = settings.tokens_per_micro_batch, records.longest
    if given != "auto" and given < longest.length:
        raise RecipeError(
            f"stages.{stage}.tokens_per_micro_batch: is {given:,}, but {longest.where} has {longest.length:,} tokens, "
            f"and a micro-batch must hold the longest conversation; set auto, or {longest.length:,} or more, or a "
            f"lower stages.{stage}.max_length, which cuts conversations"
        )
    steps = records.sample_steps(settings, recipe.seed)
    shards = world_size() if recipe.distributed.shard else 1
    offloads = recipe.distributed.offload and world_size() > 1
    parts = settings, recipe.quantization, recipe.adapter
    return StageShapes(stage, *parts, config, dtype, longest.length, steps, shards, offloads)


def usable_bytes(device: str, memory: int | None = None) -> int:
    """Return the bytes to plan with: of a card of `memory` bytes, or of what is free on `device` (`cuda`, `cpu`)."""
    if memory is not None:
        return max(0, int(_USABLE_SHARE * memory - _overhead(device)))
    return int(_USABLE_SHARE * free_memory_bytes(device))


def _overhead(device: str) -> float:
    """Return the bytes of a device that a plan does not count; what is free on it is without them."""
    return (_CUDA_OVERHEAD + (_LINK_BYTES if world_size() > 1 else 0)) if device == "cuda" else 0


def plan_memory(shapes: StageShapes, machine: Machine) -> MemoryPlan:
    """Choose what the recipe leaves at `auto`: the fastest plan that fits `machine`.

    Raises TrainingError if nothing fits, with the least that would.
    """
    plans = list(_candidates(shapes, machine))
    fitting = [plan for plan in plans if plan.bytes_needed <= plan.bytes_usable]
    if not fitting:
        raise TrainingError(_too_small(min(plans, key=lambda plan: plan.bytes_needed), shapes))
    best = _preferred(fitting)
    full_precision = [plan for plan in fitting if "8bit" not in plan.optim]
    if full_precision and "8bit" in best.optim:
        fp32 = _preferred(full_precision)
        return fp32 if fp32.cost <= (1 + _MIN_8BIT_GAIN) * best.cost else best
    return best


def with_possible_graphs(plan: MemoryPlan, shapes: StageShapes, machine: Machine) -> MemoryPlan:
    """Return a plan without graphs where they are not possible: that of a checkpoint may be of a single process.

    Graphs would read weights at addresses from which sharding and offloading move them.
    """
    return plan if shapes.may_use_graphs(machine) else replace(plan, graphs=False)


def has_room_for_scales(plan: MemoryPlan, config: LlavaConfig) -> bool:
    """Return whether a plan leaves the memory for the scales of NF4 weights in fp32; it decides speed alone."""
    return plan.bytes_needed + plain_scale_bytes(config) <= plan.bytes_usable


def plan_line(plan: MemoryPlan, shapes: StageShapes, source: str = "auto") -> str:
    """Name each planned setting with its value and origin: the recipe, or `source` where the recipe says `auto`."""
    settings = shapes.settings
    values: dict[str, tuple[str, object]] = {
        "tokens_per_micro_batch": (f"{plan.tokens_per_micro_batch:,}", settings.tokens_per_micro_batch),
        "gradient_checkpointing": (str(plan.recompute), settings.gradient_checkpointing),
        "optim": (plan.optim, settings.optim),
    }
    if shapes.quantization.type == "nf4":
        keep_dequantized = str(plan.keep_dequantized).lower()
        values["keep_dequantized"] = (keep_dequantized, shapes.quantization.keep_dequantized)
    if plan.graphs:
        values["cuda_graphs"] = ("on", settings.cuda_graphs)
    origins = [
        f"{name}: {value} ({source if set_to == 'auto' else 'recipe'})" for name, (value, set_to) in values.items()
    ]
    needed, usable = plan.bytes_needed / GIB, plan.bytes_usable / GIB
    parts = f", frozen weights in {shapes.shards} parts" if shapes.shards > 1 else ""
    parts += ", gradients and optimizer on the host" if shapes.offloads else ""
    return f"{', '.join(origins)}{parts}; needs {needed:.1f} of {usable:.1f} GiB"


def next_smaller(shapes: StageShapes, machine: Machine, failed: MemoryPlan) -> str:
    """Say what to do after `failed` ran out of memory: the option that asks for a clearly smaller plan."""
    retry = _RETRY_SHARE * min(failed.bytes_needed, machine.usable)
    size = math.floor(10 * (retry + _overhead(machine.device)) / (_USABLE_SHARE * GIB)) / 10
    # Of the size as it is printed, so that a run with the option plans the same.
    usable = usable_bytes(machine.device, int(size * GIB))
    try:
        plan = plan_memory(shapes, replace(machine, usable=usable))
    except TrainingError as error:
        return str(error)
    return f"run it again with --memory {size:.1f}GiB, which plans {plan_line(plan, shapes)}"


def predicted_seconds(shapes: StageShapes, plan: MemoryPlan, tokens: int) -> float | None:
    """Return the seconds that a row of `tokens` tokens takes as planned; None if the speed is not measured."""
    if not plan.speed.is_measured:
        return None
    passes = shapes.passes(plan.recompute, keep_dequantized=plan.keep_dequantized, graphs=plan.graphs)
    return float(passes.row_times(np.array([tokens]), plan.speed)[0])


def _preferred(plans: Sequence[MemoryPlan]) -> MemoryPlan:
    """Return the plan that needs the least memory of those that are about as fast as the fastest."""
    fastest = min(plan.cost for plan in plans)
    return min((plan for plan in plans if plan.cost <= _AS_FAST * fastest), key=lambda plan: plan.bytes_needed)


def _candidates(shapes: StageShapes, machine: Machine) -> Iterator[MemoryPlan]:
    """Yield a plan for each combination of the open choices."""
    settings = shapes.settings
    optimizers, layer = _optimizers(shapes, machine.device), shapes.layers(machine.attention)
    for keep_dequantized, recompute, graphs in product(
        _keep_dequantized_choices(shapes.quantization, shapes.shards),
        _recomputes(shapes, machine),
        [False, True] if shapes.may_use_graphs(machine) else [False],
    ):
        passes = shapes.passes(recompute, keep_dequantized=keep_dequantized, graphs=graphs)
        # Weights, gradients and optimizer states do not depend on the micro-batch.
        parameters = shapes.held_parameters(keep_dequantized=keep_dequantized)
        memory = {optim: expected_memory(optim, parameters, offloads=shapes.offloads) for optim in optimizers}
        fixed = {optim: sum(part.total for part in parts) for optim, parts in memory.items()}
        for tokens in _micro_batch_sizes(settings, shapes.longest, _MAX_TOKENS[machine.device]):
            # All tokens of a row may be supervised, those that the answers of a pair share for each of them.
            supervised = 2 * tokens if settings.trains_on_pairs else tokens
            activations = activation_bytes(shapes.config, layer, recompute, tokens, supervised)
            held = held_bytes(activations, recompute, machine.device)
            held += graph_bytes(shapes.config, shapes.dtype, tokens) if graphs else 0
            cost = relative_cost(shapes.steps, tokens, passes, machine.speed)
            for optim in optimizers:
                needed = fixed[optim] + held
                yield MemoryPlan(
                    tokens, recompute, optim, keep_dequantized, needed, machine.usable, cost, machine.speed, graphs
                )


def _keep_dequantized_choices(quantization: QuantizationSettings, shards: int) -> list[bool]:
    if quantization.keep_dequantized != "auto":
        return [quantization.keep_dequantized]
    # Gathering dequantized weights would take four times as long.
    return [False, True] if quantization.type == "nf4" and shards == 1 else [False]


def _optimizers(shapes: StageShapes, device: str) -> list[str]:
    if shapes.settings.optim != "auto":
        return [shapes.settings.optim]
    return ["adamw_torch", "paged_adamw_8bit"] if device == "cuda" and not shapes.offloads else ["adamw_torch"]


def _recomputes(shapes: StageShapes, machine: Machine) -> list[Recompute]:
    policy, layers = shapes.settings.gradient_checkpointing, int(shapes.config.text_config.num_hidden_layers)
    if policy != "auto":
        return [Recompute(policy, shapes.settings.gradient_checkpointing_layers)]
    mixed = dict.fromkeys(Recompute("selective", layers * eighths // 8) for eighths in range(8))
    if shapes.is_fused:
        # Without a layer in full, they keep as much as with no policy at all.
        mixed.pop(Recompute("selective"))
    elif not machine.suits_selective(_MAX_TOKENS[machine.device]):
        mixed.clear()
    return [Recompute(False), *mixed, Recompute(True)]


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
