"""The memory that a stage needs, worked out from shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlavaConfig

from lora_llava.data.packing import Row, tree_length
from lora_llava.modeling.base import LANGUAGE_MODEL, PROJECTOR, drop_unused_layers, meta_model
from lora_llava.modeling.packed import HEAD_CHUNK
from lora_llava.modeling.stages import PartRow, build_stage, parameter_table
from lora_llava.recipe import Recipe
from lora_llava.recipe_stages import StageName, StageSettings
from lora_llava.training.plan import StageData

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


def planned_parameters(recipe: Recipe, stage: StageName, config: LlavaConfig, dtype: torch.dtype) -> list[PartRow]:
    """Build the stage's model without memory and return its table, with quantised weights as they would be."""
    model: Any = meta_model(config).to(dtype)
    model.get_submodule(PROJECTOR).float()
    drop_unused_layers(model)
    language_model = model.get_submodule(LANGUAGE_MODEL)
    linears = [module.weight.numel() for module in language_model.modules() if isinstance(module, torch.nn.Linear)]
    quantization = recipe.quantization
    in_4_bits = sum(linears) if quantization.type == "nf4" and not quantization.keep_dequantized else 0
    saved = round(in_4_bits * (dtype.itemsize - NF4_BYTES[quantization.double_quant]))
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
    return sum(tree_length(tree, data.encoded.items) for tree in row)


def _row_targets(row: Row, data: StageData) -> int:
    return sum(data.encoded.num_supervised[index] for tree in row for index in tree)


def activation_bytes(
    config: LlavaConfig, settings: StageSettings, tokens: int, targets: int, dtype: torch.dtype
) -> int:
    """Estimate what the backward pass needs kept of a micro-batch of `tokens` tokens, `targets` of them supervised.

    While a checkpointed layer is computed again, it is kept whole; see `modeling.recompute`.
    """
    layers, width = int(config.text_config.num_hidden_layers), int(config.text_config.hidden_size)
    whole, products, inputs = _whole_layer(config, dtype), _layer_products(config), width
    if settings.gradient_checkpointing is False:
        kept = layers * whole
    elif settings.gradient_checkpointing is True:
        kept = layers * inputs * dtype.itemsize + whole
    else:
        full = min(settings.gradient_checkpointing_layers, layers)
        kept = (full * inputs + (layers - full) * (inputs + products)) * dtype.itemsize + whole
    # Logits in the model's precision, then in fp32, and their gradient, of one chunk.
    logits = min(targets, HEAD_CHUNK) * int(config.text_config.vocab_size) * (dtype.itemsize + 8)
    return tokens * kept + logits


def _whole_layer(config: LlavaConfig, dtype: torch.dtype) -> int:
    """Bytes a token that a layer with LoRA keeps when nothing is computed again.

    Measured on Llama layers, fp32: 9 widths and 4 intermediate widths. In bf16 the two norms keep fp32 copies besides.
    """
    text = config.text_config
    widths = 9 if dtype == torch.float32 else 13
    return (widths * int(text.hidden_size) + 4 * int(text.intermediate_size)) * dtype.itemsize


def _layer_products(config: LlavaConfig) -> int:
    """Elements a token that selective recomputing keeps: of the seven linear layers and of attention."""
    text = config.text_config
    queries = int(text.num_attention_heads) * int(text.head_dim)
    keys = int(text.num_key_value_heads) * int(text.head_dim)
    return 2 * queries + 2 * keys + 2 * int(text.hidden_size) + 2 * int(text.intermediate_size)
