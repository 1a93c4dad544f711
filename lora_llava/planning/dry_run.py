"""What a run would do, and need, found out without weights, without training, and without writing anything."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console
from transformers import LlavaConfig

from lora_llava.data.stage import StageRecords, cache_offer, length_lines, plan_records, read_records
from lora_llava.errors import TrainingError
from lora_llava.modeling.metadata import describe_base
from lora_llava.modeling.structure import BF16, FLEX, FP32, TREES, ElementType, attention_on_cpu, image_tokens
from lora_llava.planning.memory import (
    MemoryRow,
    activation_bytes,
    expected_memory,
    held_bytes,
    in_4_bits,
    largest_row,
    planned_parameters,
)
from lora_llava.planning.memory_plan import (
    GIB,
    MemoryPlan,
    StageShapes,
    lora_rank,
    plan_memory,
    stage_shapes,
    usable_bytes,
)
from lora_llava.planning.speed import Machine
from lora_llava.planning.tables import mebibytes, parameter_table_view, short_part
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.stages import StageName, StageSettings
from lora_llava.system.device import device_type, pick_device, pick_dtype
from lora_llava.system.table import Column, FittingTable
from lora_llava.system.text import counted

CARDS = (12, 16, 24)
"""Sizes of consumer cards, in GiB."""


def print_dry_run(recipe: Recipe, console: Console, memory: int | None = None) -> None:
    """Print the plan of every stage, its parameters and the memory to expect; write nothing, train nothing.

    `memory`: bytes to plan for; None: what is free here.
    """
    console.print("A dry run: nothing is written.")
    config, tokenizer = describe_base(recipe.base)
    for stage in recipe.stage_names:
        settings = recipe.stage(stage)
        console.print()
        console.print(settings_view(stage, settings))
        records = read_records(settings, tokenizer, recipe.seed, **image_tokens(config))
        _print_stage(recipe, stage, config, records, memory, console)


def settings_view(stage: StageName, settings: StageSettings) -> FittingTable:
    """Lay out the settings of a stage that decide most."""
    table = FittingTable(f"Stage {stage}", [Column("", is_number=False), Column("", is_number=False)])
    length = f"{settings.max_steps} steps" if settings.max_steps > 0 else counted(settings.num_train_epochs, "epoch")
    rows = {
        "data": settings.data.path,
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
    settings, dtype = recipe.stage(stage), compute_dtype(recipe)
    shapes = stage_shapes(recipe, stage, config, dtype, records)
    table = shapes.table
    machine = this_machine(recipe, memory)
    chosen = plan_memory(shapes, machine)
    data = plan_records(records, stage, settings, chosen.tokens_per_micro_batch, recipe.seed)
    console.print("\n".join([data.summary(), *length_lines(stage, settings, data)]), soft_wrap=not console.is_terminal)
    if offer := cache_offer(settings, data):
        console.print(offer)
    tokens, targets = largest_row(data)
    if recipe.quantization.type == "nf4" and not chosen.keep_dequantized:
        table = in_4_bits(table, config, recipe.quantization, dtype)
    console.print(parameter_table_view(table, "Parameters, as they would be"))
    rank = lora_rank(recipe, stage)
    activations = activation_bytes(config, chosen.recompute, tokens, targets, dtype, rank, machine.attention)
    activations = held_bytes(activations, chosen.recompute, machine.device)
    console.print(f"On this machine: {chosen}")
    console.print(memory_view(expected_memory(chosen.optim, table), activations, tokens))
    console.print(cards_view(cards(shapes)))


def this_machine(recipe: Recipe, memory: int | None) -> Machine:
    """Describe this machine, or its device with `memory` bytes; on CUDA `auto` is taken for FlexAttention, untried."""
    device, setting = device_type(), recipe.attn_implementation
    if device == "cpu":
        return Machine(device, usable_bytes(device, memory), attention_on_cpu(setting))
    return Machine(device, usable_bytes(device, memory), TREES if setting == "sdpa" else FLEX)


def cards(shapes: StageShapes) -> dict[int, MemoryPlan | None]:
    """Plan a stage for cards of some sizes, in GiB; None where it does not fit."""
    recipe = shapes.recipe
    dtype = FP32 if recipe.precision == "fp32" else BF16
    table = planned_parameters(recipe, shapes.stage, shapes.config, dtype)
    attention = TREES if recipe.attn_implementation == "sdpa" else FLEX
    plans: dict[int, MemoryPlan | None] = {}
    for size in CARDS:
        machine = Machine("cuda", usable_bytes("cuda", size * GIB), attention)
        try:
            plans[size] = plan_memory(replace(shapes, table=table, dtype=dtype), machine)
        except TrainingError:
            plans[size] = None
    return plans


def compute_dtype(recipe: Recipe) -> ElementType:
    """Precision of the run; bf16 in the recipe is taken on its word, since the run may be on another machine."""
    if recipe.precision == "bf16":
        return BF16
    # A CPU computes in fp32; only of a GPU it must be asked, through PyTorch, what it can do.
    return FP32 if device_type() == "cpu" else pick_dtype(recipe.precision, pick_device())


def memory_view(rows: list[MemoryRow], activations: int, tokens: int) -> FittingTable:
    """Lay out the expected memory in MiB."""
    columns = [
        Column("part", is_number=False),
        Column("weights", importance=1),
        Column("gradients", importance=3),
        Column("optimizer", importance=2),
        Column("total"),
    ]
    table = FittingTable("Memory to expect, MiB, without Python and libraries", columns)
    for row in rows:
        sizes = (row.weights, row.gradients, row.optimizer, row.total)
        table.add(short_part(row.part), *(mebibytes(size) for size in sizes))
    table.add(f"activations, {tokens:,} tokens (estimate)", "", "", "", mebibytes(activations))
    total = mebibytes(sum(row.total for row in rows) + activations)
    table.add("all", "", "", "", total, is_total=True)
    return table


def cards_view(plans: dict[int, MemoryPlan | None]) -> FittingTable:
    """Lay out what would be chosen on cards of several sizes; the fastest counts as 1."""
    columns = [
        Column("GiB"),
        Column("tokens a\nmicro-batch"),
        Column("recomputing", importance=1),
        Column("optimizer", importance=3),
        Column("dequantized", importance=4),
        Column("GiB needed"),
        Column("relative\ntime", importance=2),
    ]
    table = FittingTable("On a card of", columns)
    fastest = min((plan.cost for plan in plans.values() if plan), default=1.0)
    for size, plan in plans.items():
        if plan is None:
            table.add(str(size), "does not fit", "", "", "", "", "")
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
