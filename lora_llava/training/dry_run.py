"""What a run would do, and need, found out without weights, without training, and without writing anything."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlavaConfig

from lora_llava.data.packing import Row
from lora_llava.device import pick_device, pick_dtype
from lora_llava.errors import DataError, ModelError
from lora_llava.modeling.base import LANGUAGE_MODEL, PROJECTOR, meta_model, num_image_tokens
from lora_llava.modeling.describe import describe_base, is_missing
from lora_llava.modeling.stages import PartRow, build_stage, parameter_table
from lora_llava.recipe import DataSettings, Recipe, StageName, StageSettings
from lora_llava.training.plan import StageData, prepare_data
from lora_llava.training.tables import mebibytes, parameter_table_view

NF4_BYTES = {True: 0.516, False: 0.5625}
"""Bytes a weight in NF4, by double quantisation: 4 bits, and a scale for every 64 weights (fp32, or 8 bits and
an fp32 scale for every 256 of them)."""


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """Expected memory of one part, in bytes."""

    part: str
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Everything the part needs."""
        return self.weights + self.gradients + self.optimizer


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
        plan = data.plan
        validation = f" and {len(data.validation_records):,} for validation" if data.validation_records else ""
        console.print(
            f"{len(data.records):,} conversations{validation}; {len(plan.steps):,} optimizer steps of "
            f"{plan.rows_per_step} micro-batches; {plan.num_computed_tokens:,} tokens, "
            f"{plan.share_saved:.0%} saved by packing"
        )
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


def planned_parameters(recipe: Recipe, stage: StageName, config: LlavaConfig, dtype: torch.dtype) -> list[PartRow]:
    """Build the stage's model without memory and return its table, with quantised weights as they would be."""
    model: Any = meta_model(config).to(dtype)
    model.get_submodule(PROJECTOR).float()
    language_model = model.get_submodule(LANGUAGE_MODEL)
    linears = [module.weight.numel() for module in language_model.modules() if isinstance(module, torch.nn.Linear)]
    in_4_bits = sum(linears) if recipe.quantization.type == "nf4" else 0
    saved = round(in_4_bits * (dtype.itemsize - NF4_BYTES[recipe.quantization.double_quant]))
    return [
        replace(row, quantized=in_4_bits, bytes=row.bytes - saved, dtypes=f"{row.dtypes}, nf4")
        if row.part == LANGUAGE_MODEL and in_4_bits
        else row
        for row in parameter_table(build_stage(model, stage, recipe.adapter))
    ]


def expected_memory(settings: StageSettings, table: list[PartRow]) -> list[MemoryRow]:
    """Work out weights, gradients and AdamW's two states of each part; what is trained is so in fp32."""
    state = 2 if "8bit" in settings.optim else 8
    return [MemoryRow(row.part, row.bytes, 4 * row.trainable, state * row.trainable) for row in table]


def largest_row(data: StageData) -> tuple[int, int]:
    """Return the most tokens, and the most supervised tokens, of one micro-batch."""
    rows = [row for step in data.plan.steps for row in step if row]
    return max(_row_length(row, data) for row in rows), max(_row_targets(row, data) for row in rows)


def _row_length(row: Row, data: StageData) -> int:
    shared = sum(data.encoded[tree[0]].prefix_length for tree in row)
    own = [data.encoded[index] for tree in row for index in tree]
    return shared + sum(len(one.input_ids) - one.prefix_length for one in own)


def _row_targets(row: Row, data: StageData) -> int:
    return sum(data.encoded[index].num_supervised for tree in row for index in tree)


def activation_bytes(
    config: LlavaConfig, settings: StageSettings, tokens: int, targets: int, dtype: torch.dtype
) -> int:
    """Estimate what the backward pass needs kept of a micro-batch of `tokens` tokens, `targets` of them supervised.

    Measured on Llama layers with LoRA, fp32: 9 widths and 4 intermediate widths a token and layer. In bf16 the
    two norms keep fp32 copies besides. With checkpointing one layer is kept whole, of the others the input.
    """
    text = config.text_config
    width, layers = int(text.hidden_size), int(text.num_hidden_layers)
    layer = ((9 if dtype == torch.float32 else 13) * width + 4 * int(text.intermediate_size)) * dtype.itemsize
    kept = layer + layers * width * dtype.itemsize if settings.gradient_checkpointing else layers * layer
    # Logits in the model's precision, then in fp32, and their gradient.
    return tokens * kept + targets * int(text.vocab_size) * (dtype.itemsize + 8)


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
