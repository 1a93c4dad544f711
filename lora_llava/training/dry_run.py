"""What a run would do, and need, found out without weights, without training, and without writing anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlavaConfig

from lora_llava.device import pick_device, pick_dtype
from lora_llava.errors import DataError, ModelError
from lora_llava.modeling.base import num_image_tokens
from lora_llava.modeling.describe import describe_base, is_missing
from lora_llava.recipe import Recipe
from lora_llava.recipe_stages import DataSettings, StageName, StageSettings
from lora_llava.training.memory import (
    MemoryRow,
    activation_bytes,
    expected_memory,
    largest_row,
    planned_parameters,
)
from lora_llava.training.plan import StageData, prepare_data
from lora_llava.training.tables import mebibytes, parameter_table_view


def print_dry_run(recipe: Recipe, console: Console) -> None:
    """Print the plan of every stage, its parameters and the memory to expect; write nothing, train nothing.

    If the base, or data of the hub, cannot be had, one line says so and the rest is printed from the recipe.
    """
    console.print(f"Recipe {recipe.name}: {', then '.join(recipe.stage_names)}. A dry run: nothing is written.")
    try:
        base = describe_base(recipe.base)
    except ModelError as error:
        if not is_missing(error):
            raise
        console.print(f"Not here, so data and memory are not shown: {error}", soft_wrap=True, markup=False)
        base = None
    for stage in recipe.stage_names:
        settings = recipe.stage(stage)
        console.print()
        console.print(settings_view(stage, settings))
        if base is not None:
            config, tokenizer = base
            data = _data_or_line(recipe, settings, config, tokenizer, console)
            _print_stage(recipe, stage, config, data, console)


def settings_view(stage: StageName, settings: StageSettings) -> Table:
    """Lay out the settings of a stage that decide most."""
    table = Table(title=f"Stage {stage}", title_justify="left", show_header=False)
    length = f"{settings.max_steps} steps" if settings.max_steps > 0 else f"{settings.num_train_epochs:g} epochs"
    rows = {
        "data": settings.data.path,
        "template": settings.template,
        "length": length,
        "batch_size": f"{settings.batch_size} conversations a step",
        "learning_rate": f"{settings.learning_rate:g}, {settings.lr_scheduler_type}",
        "packing": f"{settings.packing}, up to {settings.tokens_per_micro_batch:,} tokens a micro-batch",
        "optim": settings.optim,
        "gradient_checkpointing": str(settings.gradient_checkpointing).lower(),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def is_hub_data(data: DataSettings) -> bool:
    """Tell whether records would come from the hub."""
    return not data.path.endswith((".json", ".jsonl", ".parquet")) and not Path(data.path).expanduser().exists()


def _data_or_line(
    recipe: Recipe, settings: StageSettings, config: LlavaConfig, tokenizer: Any, console: Console
) -> StageData | None:
    """Read and plan the data of a stage; None, and a line that says so, if it is on the hub and cannot be had."""
    try:
        return prepare_data(
            settings,
            tokenizer,
            image_token_id=int(config.image_token_id),
            num_image_tokens=num_image_tokens(config),
            seed=recipe.seed,
        )
    except DataError as error:
        if not is_hub_data(settings.data):
            raise
        console.print(f"Data not here, so steps are not counted: {error}", soft_wrap=True, markup=False)
        return None


def _print_stage(
    recipe: Recipe, stage: StageName, config: LlavaConfig, data: StageData | None, console: Console
) -> None:
    settings = recipe.stage(stage)
    if data is not None:
        console.print(data.summary())
    dtype = compute_dtype(recipe)
    table = planned_parameters(recipe, stage, config, dtype)
    console.print(parameter_table_view(table, "Parameters, as they would be"))
    tokens, targets = largest_row(data) if data is not None else (settings.tokens_per_micro_batch, 0)
    activations = activation_bytes(config, settings, tokens, targets, dtype)
    console.print(memory_view(expected_memory(settings, table), activations, tokens))


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """Precision of the run; bf16 in the recipe is taken on its word, since the run may be on another machine."""
    if recipe.precision == "bf16":
        return torch.bfloat16
    return pick_dtype(recipe.precision, pick_device())


def memory_view(rows: list[MemoryRow], activations: int, tokens: int) -> Table:
    """Lay out the expected memory in MiB."""
    table = Table(title="Memory to expect, MiB", title_justify="left")
    table.add_column("part")
    for heading in ("weights", "gradients", "optimizer", "total"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row.part, *(mebibytes(size) for size in (row.weights, row.gradients, row.optimizer, row.total)))
    table.add_row(f"activations, {tokens:,} tokens (estimate)", "", "", "", mebibytes(activations), end_section=True)
    table.add_row("all", "", "", "", mebibytes(sum(row.total for row in rows) + activations), style="bold")
    return table
