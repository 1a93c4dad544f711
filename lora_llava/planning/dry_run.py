"""The dry run: what a run would do and need, without reading weights, training or writing anything."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console
from transformers import LlavaConfig

from lora_llava.data.stage import StageData, StageRecords, cache_offer, length_lines, plan_records, read_records
from lora_llava.errors import TrainingError
from lora_llava.modeling.metadata import describe_base
from lora_llava.modeling.structure import (
    BF16,
    FLEX,
    FP16,
    FP32,
    SDPA,
    TREES,
    Attention,
    ElementType,
    attention_on_cpu,
    image_tokens,
)
from lora_llava.planning.memory import (
    PartMemory,
    activation_bytes,
    expected_memory,
    held_bytes,
    largest_row,
)
from lora_llava.planning.memory_plan import (
    GIB,
    MemoryPlan,
    StageShapes,
    plan_line,
    plan_memory,
    stage_shapes,
    usable_bytes,
)
from lora_llava.planning.speed import Machine
from lora_llava.planning.tables import mebibytes, parameter_table_view, short_part
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.stages import StageName, StageSettings
from lora_llava.system.device import device_type, pick_device, pick_dtype, precision_line
from lora_llava.system.ranks import planned_for, world_size
from lora_llava.system.table import Column, FittingTable
from lora_llava.system.text import counted

_CARDS = (12, 16, 24)
"""Memory of common consumer cards, in GiB."""
_SHARDS = (2, 4)
"""Numbers of cards to divide the frozen weights between where one is too small."""
_NAMED = {"fp32": FP32, "fp16": FP16, "bf16": BF16}


def print_dry_run(recipe: Recipe, console: Console, memory: int | None = None) -> None:
    """Print each stage's plan, parameters and expected memory; train and write nothing.

    `memory`: bytes to plan for; None: what is free on this machine.
    """
    console.print("A dry run: nothing is written.")
    if (cards := world_size()) > 1:
        line = f"On {cards} cards: each holds the whole model and computes its part of every step."
        console.print(f"{line} Memory is that of a card.", soft_wrap=not console.is_terminal)
    config, tokenizer = describe_base(recipe.base)
    for stage in recipe.stage_names:
        settings = recipe.stage(stage)
        console.print()
        console.print(_settings_view(stage, settings))
        records = read_records(settings, tokenizer, image_tokens(config), recipe.seed)
        _print_stage(recipe, stage, config, records, memory, console)


def _settings_view(stage: StageName, settings: StageSettings) -> FittingTable:
    """Lay out the most important settings of a stage."""
    table = FittingTable(f"Stage {stage}", [Column("", is_number=False), Column("", is_number=False)])
    length = f"{settings.max_steps} steps" if settings.max_steps > 0 else counted(settings.num_train_epochs, "epoch")
    rows = {
        "data": ", ".join(source.path for source in settings.data.sources),
        "template": settings.template,
        "length": length,
        "batch_size": "auto" if (size := settings.batch_size) == "auto" else f"{counted(size, 'conversation')} a step",
        "learning_rate": f"{settings.learning_rate:g}, {settings.lr_scheduler_type}",
        "packing": settings.packing,
    }
    for name, value in rows.items():
        table.add(name, value)
    return table


def _print_stage(
    recipe: Recipe,
    stage: StageName,
    config: LlavaConfig,
    records: StageRecords,
    memory: int | None,
    console: Console,
) -> None:
    settings, dtype = recipe.stage(stage), compute_dtype(recipe.precision)
    shapes = stage_shapes(recipe, stage, config, dtype, records)
    machine = this_machine(recipe.attn_implementation, memory)
    plan = plan_memory(shapes, machine)
    data = plan_records(records, settings, plan.tokens_per_micro_batch, recipe.seed)
    lines = [data.summary(), *length_lines(stage, settings, data), precision_line(recipe.precision, dtype)]
    console.print("\n".join(filter(None, lines)), soft_wrap=not console.is_terminal)
    if offer := cache_offer(settings, data):
        console.print(offer)
    _print_memory(shapes, machine, plan, data, console)
    on_card = replace(shapes, dtype=_NAMED.get(recipe.precision, BF16))
    plans = {size: _plan_for_card(on_card, recipe.attn_implementation, size) for size in _CARDS}
    several = {size: _cards_needed(on_card, recipe.attn_implementation, size) for size in plans if not plans[size]}
    console.print(_cards_view(plans, several))
    if any(several.values()):
        console.print("Several cards: with distributed.shard: true, which divides the frozen weights between them")


def _print_memory(shapes: StageShapes, machine: Machine, plan: MemoryPlan, data: StageData, console: Console) -> None:
    """Print the parameters of a stage, and the memory that `plan` needs for its largest micro-batch."""
    config, parameters = shapes.config, shapes.held_parameters(keep_dequantized=plan.keep_dequantized)
    console.print(parameter_table_view(parameters, "Parameters, as they would be"))
    tokens, supervised = largest_row(data)
    activations = activation_bytes(config, shapes.layers(machine.attention), plan.recompute, tokens, supervised)
    activations = held_bytes(activations, plan.recompute, machine.device)
    console.print(f"On this machine: {plan_line(plan, shapes)}")
    console.print(_memory_view(expected_memory(plan.optim, parameters, offloads=shapes.offloads), activations, tokens))


def this_machine(attn_implementation: str, memory: int | None) -> Machine:
    """Describe this machine, or its device with `memory` bytes; on CUDA `auto` counts as FlexAttention, untried."""
    device = device_type()
    attention = attention_on_cpu if device == "cpu" else _attention_on_cuda
    return Machine(device, usable_bytes(device, memory), attention(attn_implementation))


def _attention_on_cuda(attn_implementation: str) -> Attention:
    return TREES if attn_implementation == SDPA else FLEX


def _plan_for_card(shapes: StageShapes, attn_implementation: str, size: int) -> MemoryPlan | None:
    """Plan a stage for a card of `size` GiB; None if it does not fit."""
    machine = Machine("cuda", usable_bytes("cuda", size * GIB), _attention_on_cuda(attn_implementation))
    try:
        return plan_memory(shapes, machine)
    except TrainingError:
        return None


def _cards_needed(shapes: StageShapes, attn_implementation: str, size: int) -> int | None:
    """Return the smallest number of cards of `size` GiB that hold a sharded model.

    None if none of `_SHARDS` does, or if the stage cannot be sharded.
    """
    if shapes.offloads or shapes.settings.trains_on_pairs:
        return None
    for count in _SHARDS:
        # Several cards also hold the buffers through which they exchange gradients.
        with planned_for(count):
            if count > shapes.shards and _plan_for_card(replace(shapes, shards=count), attn_implementation, size):
                return count
    return None


def compute_dtype(precision: str) -> ElementType:
    """Return the compute precision of a run; one that is named is not checked, since the run may be elsewhere."""
    if precision in _NAMED:
        return _NAMED[precision]
    # A CPU computes in fp32; what a GPU supports only PyTorch can tell, which is imported here alone.
    return FP32 if device_type() == "cpu" else pick_dtype(precision, pick_device())


def _memory_view(parts: list[PartMemory], activations: int, tokens: int) -> FittingTable:
    """Lay out the expected memory, in MiB."""
    columns = [
        Column("part", is_number=False),
        Column("weights", importance=1),
        Column("gradients", importance=3),
        Column("optimizer", importance=2),
        Column("total"),
    ]
    table = FittingTable("Memory to expect, MiB, without Python and libraries", columns)
    for part in parts:
        sizes = (part.weights, part.gradients, part.optimizer, part.total)
        table.add(short_part(part.part), *(mebibytes(size) for size in sizes))
    table.add(f"activations, {tokens:,} tokens (estimate)", "", "", "", mebibytes(activations))
    total = mebibytes(sum(part.total for part in parts) + activations)
    table.add("all", "", "", "", total, is_total=True)
    return table


def _cards_view(plans: dict[int, MemoryPlan | None], several: dict[int, int | None]) -> FittingTable:
    """Lay out the plans for cards of several sizes; the time of the fastest counts as 1.

    `several`: the number of cards that hold it where one does not.
    """
    columns = [
        Column("GiB"),
        Column("tokens per\nmicro-batch"),
        Column("recomputed", importance=1),
        Column("optimizer", importance=3),
        Column("dequantized", importance=4),
        Column("GiB needed"),
        Column("relative\ntime", importance=2),
    ]
    table = FittingTable("On a card of", columns)
    fastest = min((plan.cost for plan in plans.values() if plan), default=1.0)
    for size, plan in plans.items():
        if plan is None:
            count = several.get(size)
            table.add(str(size), f"fits {count} cards" if count else "does not fit", "", "", "", "", "")
            continue
        table.add(
            str(size),
            f"{plan.tokens_per_micro_batch:,}",
            str(plan.recompute),
            plan.optim,
            "once" if plan.keep_dequantized else "each pass",
            f"{plan.bytes_needed / GIB:.1f}",
            f"{plan.cost / fastest:.2f}",
        )
    return table
