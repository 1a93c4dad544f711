"""The memory that a stage needs, worked out from shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import LlavaConfig

from lora_llava.data.packing import Row, tree_length
from lora_llava.data.stage import StageData
from lora_llava.modeling.structure import (
    FLEX,
    FP32,
    HEAD_CHUNK,
    LANGUAGE_MODEL,
    TREES,
    Attention,
    ElementType,
    PartRow,
    attention_widths,
    linear_weights,
    stage_parameters,
)
from lora_llava.recipe.settings import QuantizationSettings, Recipe
from lora_llava.recipe.stages import GradientCheckpointing, StageName
from lora_llava.system.text import counted

NF4_BYTES = {True: 0.516, False: 0.5625}
"""Bytes a weight in NF4, by double quantisation: 4 bits, and a scale for every 64 weights (fp32, or 8 bits and
an fp32 scale for every 256 of them)."""
CPU_HEAP = 1.7
"""On a CPU, memory held for a byte that lives, where layers are computed again: blocks of many sizes come and go, and
glibc's heap keeps the gaps. Measured: 628 MiB held of 370 planned at 1,536 tokens. An M_MMAP_THRESHOLD of 64 KiB would
avoid it, but takes 25 % more CPU time (median of 3 interleaved runs of 6 Llama layers), most of it in page faults."""
LATER_BRANCHES = 0.25
"""Share of a row's tokens that have a row in SDPA's mask, if all is one tree: an estimate."""


@dataclass(frozen=True, slots=True)
class Recompute:
    """What the backward pass computes again; see `modeling.recompute`."""

    policy: GradientCheckpointing
    full_layers: int = 0
    """With `selective`: layers that keep their input alone."""

    def __str__(self) -> str:
        """Name the policy in a word or few."""
        if self.policy is False:
            return "none"
        if self.policy is True:
            return "full"
        return f"selective, {counted(self.full_layers, 'layer')} in full" if self.full_layers else "selective"


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


def planned_parameters(recipe: Recipe, stage: StageName, config: LlavaConfig, dtype: ElementType) -> list[PartRow]:
    """Return the table of the stage's model; nothing is quantised yet, see `in_4_bits`."""
    return stage_parameters(config, stage, recipe.adapter, dtype)


def in_4_bits(
    table: list[PartRow], config: LlavaConfig, quantization: QuantizationSettings, dtype: ElementType
) -> list[PartRow]:
    """Return `table` with the language model's linear layers in NF4."""
    count = linear_weights(config)
    saved = round(count * (dtype.itemsize - NF4_BYTES[quantization.double_quant]))
    return [
        replace(row, quantized=count, bytes=row.bytes - saved, dtypes=f"{row.dtypes}, nf4")
        if row.part == LANGUAGE_MODEL
        else row
        for row in table
    ]


def query_width(config: LlavaConfig) -> int:
    """Return the width of a layer's queries, all heads together."""
    return attention_widths(config)[0]


def expected_memory(optim: str, table: list[PartRow]) -> list[MemoryRow]:
    """Work out weights, gradients and AdamW's two states of each part; what is trained is so in fp32."""
    state = 2 if "8bit" in optim else 8
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
    config: LlavaConfig,
    recompute: Recompute,
    tokens: int,
    targets: int,
    dtype: ElementType,
    rank: int,
    attention: Attention = TREES,
) -> int:
    """Estimate the most that a micro-batch needs besides weights, gradients and optimizer.

    `tokens` tokens, `targets` of them supervised; `rank` of LoRA, 0 without. While a checkpointed layer is computed
    again, it is kept whole; see `modeling.recompute`.
    """
    text = config.text_config
    layers, width, wide = int(text.num_hidden_layers), int(text.hidden_size), int(text.intermediate_size)
    inputs, products = width * dtype.itemsize, _layer_products(config) * dtype.itemsize
    whole, last = _whole_layer(config, dtype, rank), _last_layer(config, dtype, rank)
    # The last layer is never computed again, nor all of it at all.
    layers -= 1
    full = min(recompute.full_layers, layers) if recompute.policy == "selective" else layers * recompute.policy
    other = whole if recompute.policy is False else inputs + products
    # The first layers are those done in full: when the way back comes to them, the others have been freed.
    at_the_end = full * inputs + (layers - full) * other + max(last, whole - other if full < layers else 0)
    kept = max(at_the_end, full * inputs + (whole - inputs if full else 0))
    # What a layer's backward pass itself works with, measured: 5 widths and 2 intermediate widths.
    kept += (5 * width + 2 * wide) * dtype.itemsize
    # SDPA's masks are of the branches after the first, in the model's precision; FlexAttention's is a bool while its
    # blocks are found.
    mask = tokens * tokens * (1 if attention == FLEX else LATER_BRANCHES * dtype.itemsize)
    # Logits in the model's precision, then in fp32, and their gradient, of one chunk.
    logits = min(targets, HEAD_CHUNK) * int(text.vocab_size) * (dtype.itemsize + 8)
    return round(tokens * kept + mask + logits)


def held_bytes(activations: int, recompute: Recompute, device: str) -> int:
    """Return what the process holds for `activations` that live at one time; see CPU_HEAP."""
    return round(activations * CPU_HEAP) if device == "cpu" and recompute.policy is not False else activations


def _whole_layer(config: LlavaConfig, dtype: ElementType, rank: int) -> int:
    """Bytes a token that a layer with LoRA keeps when nothing is computed again.

    Measured on Llama layers, fp32: 9 widths and 4 intermediate widths, and the inner products of its seven adapters.
    In bf16 the two norms keep fp32 copies besides.
    """
    text = config.text_config
    widths = 9 if dtype.itemsize == FP32.itemsize else 13
    return (widths * int(text.hidden_size) + 4 * int(text.intermediate_size) + 7 * rank) * dtype.itemsize


def _last_layer(config: LlavaConfig, dtype: ElementType, rank: int) -> int:
    """Bytes a token that the last layer keeps: what keys, values and attention need; see `modeling.last_layer`.

    Measured as for `_whole_layer`.
    """
    widths = 7 if dtype.itemsize == FP32.itemsize else 9
    return (widths * int(config.text_config.hidden_size) + 3 * rank) * dtype.itemsize


def _layer_products(config: LlavaConfig) -> int:
    """Elements a token that selective recomputing keeps: of the seven linear layers and of attention."""
    text = config.text_config
    queries, keys = attention_widths(config)
    return 2 * queries + 2 * keys + 2 * int(text.hidden_size) + 2 * int(text.intermediate_size)
